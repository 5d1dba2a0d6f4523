"""benchmarks: the reports of bench.py, one module for each idea, and their results.

    python bench.py COMMAND    # in the folder above

Reports: cost, methods, drafts, qspec, exact, quality, rotation, linears, decode, synthetic. What they share:
timing, machine, common, shapes, compare.

The one idea: a report measures, prints, and returns what goes into its JSON file. Flags, their defaults and
files belong to bench.py.
"""
