"""study.py: the settings of the study: defaults of every report, and the command of every result file.

    python bench.py all --list

The one idea: a number in a table has its command here, and nowhere else. The study of a real model needs its
directory, DIR, and prompts that its head has not seen, which docs/training.md makes; `all` leaves it out.
"""

EVERY_PRECISION = "bf16,w8a16,w8a8,w4a16,w4a8,w4a4"
DEFAULTS = {  # of flags with a default for each report; "" is for the reports without one
    "": {"precisions": "bf16,w4a16,w4a8", "batch_sizes": "1,4,8,16", "prompts": 20, "max_new_tokens": 200}
    | {"acceptance": "eagle2-8b", "precision": "bf16"},
    "cost": {"prompts": 8, "max_new_tokens": 64},
    "heads": {"prompts": 52},
    "auto": {"batch_sizes": "1,8", "prompts": 24, "max_new_tokens": 128},
    "methods": {"batch_sizes": "1"},
    "synthetic": {"shape": "llama-3.2-1b", "prompts": 4, "max_new_tokens": 64, "batch_sizes": "1"},
    "synthetic llama-3-8b": {"acceptance": "eagle3-8b", "precisions": "w4a16"},
    "synthetic llama-3-70b": {"acceptance": "eagle3-70b", "precisions": "w4a16"},
    "quality": {"precisions": EVERY_PRECISION},
    "exact": {"precisions": EVERY_PRECISION},
    "qspec_shape": {"shape": "llama-3.2-1b"},
    "decode": {"shape": "llama-3.2-1b"},
    "peers": {"precision": "w4a8", "max_new_tokens": 64},
    "when": {"acceptance": "eagle3-8b"},
    "serve": {"prompts": 64, "max_new_tokens": 64, "methods": "autoregressive,sequential,auto"}
    | {"precision": None},  # the file's own
    "sampling": {"precision": "w4a8", "batch_sizes": "1,4", "prompts": 8, "max_new_tokens": 100},
}
STUDY = {  # file -> its report and settings: all tables and figures of the README
    "cpu_kernels.json": "kernels --repeats 5",
    "cpu_decode_w4a16.json": "decode --precision w4a16 --max_new_tokens 100",
    "cpu_decode_w4a8.json": "decode --precision w4a8 --max_new_tokens 100",
    "cpu_cost.json": "cost",
    "cpu_cost_1b.json": "cost --shape llama-3.2-1b",
    "cpu_methods.json": "methods",
    "cpu_auto.json": "auto",
    "cpu_synthetic.json": "synthetic",
    "cpu_quality.json": "quality",
    "cpu_lm_head.json": "quality --precisions w4a16,w4a8,w4a4 --lm_head_bits 16,8,4",
    "cpu_heads.json": "heads",
    "cpu_tree.json": "tree --prompts 14",
    "cpu_hierarchical.json": "hierarchical --prompts 14",
    "cpu_qspec.json": "qspec --prompts 64 --repeats 3 --max_new_tokens 64",
    "cpu_qspec_1b.json": "qspec_shape --shape llama-3.2-1b --repeats 3 --max_new_tokens 32",
    "cpu_confidence.json": "confidence --prompts 12 --max_new_tokens 150",
    "cpu_noise.json": "noise --max_new_tokens 100",
    "cpu_perplexity.json": "perplexity",
    "cpu_rotation.json": "rotation",
    "cpu_hadamard.json": "hadamard --shapes llama-3.2-1b,llama-3-8b",
    "cpu_sampling.json": "sampling",
    "cpu_processes.json": "processes --precisions bf16,w4a16 --repeats 3 --max_new_tokens 100",
    "when.json": "when",
    "cpu_exact.json": "exact",
    "cpu_exact_qspec.json": "exact --precisions w4a16 --prompts 40",
    "cpu_exact_uncompiled.json": "exact --uncompiled",
    "cpu_exact_64.json": "exact --precisions w4a16 --uncompiled --prompts 64 --max_new_tokens 100",
}
SMOLLM2 = "--checkpoint_path DIR --eagle_checkpoint_path models/smollm2-135m-eagle3 --quantizer gptq"
UNSEEN = "--prompt_file test/spec_bench.jsonl,test/gsm8k.jsonl,test/human_eval.jsonl"
UNSEEN += " --max_new_tokens 64 --repeats 5"
TWO, FOUR = "--precisions w4a16,w4a8", "--precisions bf16,w8a8,w4a16,w4a8"
TURNS = "--prompts 24 --batch_sizes 1 --methods lookup"
PROBLEMS = "quality --checkpoint_path DIR --max_new_tokens 256 --tokens 8000"
REAL_STUDY = {  # of SmolLM2-135M-Instruct and its head; and of 8 B, whose random weights take 7 GB
    "smollm2_methods.json": f"methods {SMOLLM2} {UNSEEN} --prompts 18 {FOUR}",
    "smollm2_sampled.json": f"methods {SMOLLM2} {UNSEEN} --prompts 18 {TWO} --temperature 0.8",
    "smollm2_batches.json": f"methods {SMOLLM2} {UNSEEN} --prompts 24 {TWO} --batch_sizes 4,8 "
    "--methods lookup,tree,qspec,auto",
    "smollm2_auto.json": f"auto {SMOLLM2} {UNSEEN} {FOUR} {TURNS}",
    "smollm2_auto_sampled.json": f"auto {SMOLLM2} {UNSEEN} {TWO} {TURNS} --temperature 0.8",
    "smollm2_quality.json": f"{PROBLEMS} --prompt_file test/gsm8k.jsonl --prompts 131 "
    '--precisions w8a8,w4a16,w4a8,w4a4 --quantizer "rtn;gptq;rtn, rotated"',
    "smollm2_code.json": f"{PROBLEMS} --prompt_file test/human_eval.jsonl --prompts 41 --run_code "
    "--precisions w8a8,w4a16,w4a4",
    "cpu_synthetic_8b.json": "synthetic --shape llama-3-8b --middle llama-3.2-1b --prompts 2 "
    "--max_new_tokens 32",
}
