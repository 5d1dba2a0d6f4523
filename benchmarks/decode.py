"""decode.py: autoregressive decoding of a whole model of random weights, against reading its weights.

    python bench.py decode --shape llama-3.2-1b --precision w4a8

The one idea: no decoder without speculation is faster than reading all weights once per token. That floor is
measured on the same tensors, in turns with the decoding.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import kernels
from benchmarks.common import decode_all, head_bits
from benchmarks.shapes import SHAPES, random_model, weights_of_a_step
from benchmarks.timing import read_all
from costs import Stats
from gpt_spec import Decoder, Request
from sampling import Sampling


def report_decode(args: argparse.Namespace) -> dict:
    """Autoregressive decoding of a whole random model, next to reading its weights once per token."""
    model = random_model(SHAPES[args.shape], args.precision, lm_head_bits=head_bits(args, args.precision))
    decoder = Decoder(model, max_length=512)
    decoder.warm_up()
    weights = weights_of_a_step(model)
    nbytes = sum(p.nbytes for p in weights)
    reading, speeds = [], []
    for turn in range(6):
        stats = Stats()
        decode_all(decoder, [list(range(3, 35))], args.max_new_tokens, stats)
        begin = time.perf_counter()
        read_all(p for p in weights if p.nbytes > 2**16)
        reading += [time.perf_counter() - begin] if turn else []
        speeds += [stats.decode_tokens_per_second] if turn else []
    speed, rate = median(speeds), nbytes / median(reading)
    result = {"bytes_per_token": nbytes, "bandwidth": rate, "tokens_per_second": speed}
    result |= {"share_of_floor": speed * nbytes / rate, "operators": profile(decoder)}
    print(f"{args.shape} {args.precision}: {nbytes / 1e6:.0f} MB per token, reading {rate / 1e9:.1f} GB/s")
    print(f"{speed:.2f} tokens/s, {result['share_of_floor']:.2f} of {rate / nbytes:.2f}")
    for name, share in result["operators"].items():
        print(f"    {share:6.1%}  {name}")
    return result


def profile(decoder: Decoder) -> dict[str, float]:
    """Each operator's share of the time of a step, the largest first."""
    decoder.prefill(0, list(range(3, 35)), Request(Sampling(), 0))
    with torch.profiler.profile(record_shapes=True) as profiler:
        for _ in range(5):
            decoder.step()
    times: dict[str, float] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        ours = event.key.startswith("gpt_spec::linear")
        key = (
            f"{event.key} {kernels.BLOCK * event.input_shapes[1][0]} x {event.input_shapes[0][-1]}"
            if ours
            else event.key
        )
        times[key] = times.get(key, 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return {key: t / total for key, t in sorted(times.items(), key=lambda entry: -entry[1])[:10]}
