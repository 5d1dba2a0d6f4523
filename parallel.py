"""parallel.py: one model in several processes, with a GPU or some cores each: tensor parallelism.

    torchrun --nproc_per_node 2 generate.py --precision w4a16      # NCCL on GPUs, gloo on CPUs
    python generate.py --precision w4a16 --sum_parts 2             # the same text from one process

Every process (its number is its rank) has some heads, and some rows of gate, up, embedding and lm_head. The
sums in o_proj and down_proj are made in parts. Draft models are whole in every process.

The one idea: a part is a matrix product of its own, and parts are added in float32, in their order, whoever
computed them. So one process that adds as many parts says the same text. All go by the clock of rank 0.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
import process
from model import BadInput, Embedding, LanguageHead, Linear, RMSNorm, Transformer
from packing import Quantization, named_linears, reshape

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")  # split by rows


@dataclass(frozen=True)
class Ranks:
    """The processes that share a model. By default, this one is alone."""

    rank: int = 0
    count: int = 1
    group: str = ""  # torch's name for all of them; empty in a process that torchrun did not start
    parts: int = 1  # of the sums in o_proj and down_proj, those of all processes together

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all, in the order of their ranks: [n, ...] each -> [count * n, ...]."""
        if not self.group:
            return x
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), self.count, self.group)
        return torch.ops._c10d_functional.wait_tensor(gathered)

    def total(self, sums: Tensor) -> Tensor:
        """[n, ...] of this process -> the sum of those of all, added in order, [...]."""
        total, *others = self.gather(sums).unbind()
        return sum(others, total)

    def now(self) -> float:
        """Seconds, as the clock of rank 0 has them."""
        seconds = torch.tensor(time.perf_counter(), dtype=torch.float64, device="cpu")
        dist.broadcast(seconds, src=0)
        return seconds.item()

    def tell(self, value: Any) -> Any:
        """What rank 0 has, for all."""
        box = [value]
        if self.group:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, facts: dict[str, Any]) -> None:
        """Raise BadInput, in all processes, unless all of them have the same."""
        known: list[Any] = [facts] * self.count
        dist.all_gather_object(known, facts)
        for rank, name in ((rank, name) for rank in range(self.count) for name in facts):
            mine, first = known[rank].get(name), known[0].get(name)  # another version may lack some
            if mine != first:
                raise BadInput(f"{name}: {first} in rank 0, but {mine} in rank {rank}")


@contextmanager
def connected(device: str, parts: int | None, patient: bool = False) -> Iterator[Ranks]:
    """The processes that torchrun has started, or this one alone. Rank 0 reads, `patient` with who types, and
    prints for all. What goes wrong is a line of the first that notices: ConnectionError for another's end."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield Ranks(parts=parts or 1)
        return
    streams, nowhere = (os.dup(1), os.dup(2)), [os.open(os.devnull, os.O_RDWR)] * 2
    gpu, timeout = device.startswith("cuda") and torch.cuda.is_available(), timedelta(patient * 30, 600)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(minutes=2)))
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"the processes cannot begin: {str(error).splitlines()[0]}") from None
    process.redirect(*(nowhere if rank else streams))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", None, timeout, count, rank, store)
        if parts and parts % count:
            raise BadInput(f"--sum_parts is {parts}; it must be a multiple of the {count} processes")
        ranks = Ranks(rank, count, dist.group.WORLD.group_name, parts or count)
        sys.stdin = process.SharedInput(sys.stdin, ranks.tell, rank == 0)
        yield ranks
        dist.barrier()
    except BaseException as error:
        first = True
        with suppress(RuntimeError):  # the store may be gone, too
            first = store.compare_set("failed", "", str(rank)) == str(rank).encode()
        process.redirect(*(streams if first else nowhere))
        with suppress(RuntimeError, AssertionError):  # the others notice
            dist.destroy_process_group()
        time.sleep(2 if first else 0)  # the store may be in this process
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError("another process of this run has ended or does not answer") from None
        raise
    dist.destroy_process_group()


def bounds(size: int, parts: int, units: tuple[int, ...] = ()) -> list[int]:
    """Where each part of `size` begins, and the last one ends: at whole units, the first that suffice."""
    if size < parts:
        raise BadInput(f"{size} heads, rows or columns are no {parts} parts; use fewer processes")
    unit = next((u for u in units if size % u == 0 and size // u >= parts), 1)
    return [p * (size // unit) // parts * unit for p in range(parts + 1)]


def part_of(tensor: Tensor, inputs: int, begin: int, end: int) -> Tensor:
    """Of a tensor [out, inputs / k], the columns for inputs from `begin` to `end`, or the one they share."""
    each = inputs // tensor.shape[1]  # inputs of a column
    first, last = begin // each, -(-end // each)
    if last - first > 1 and (begin % each or end % each):
        raise BadInput(f"inputs {begin} to {end} are no columns of {each} inputs each; use fewer processes")
    return tensor[:, first:last]


class Share:
    """What one process has of a model."""

    def __init__(self, whole: Transformer, ranks: Ranks):
        """`whole`: on the meta device, in the form of its weights."""
        c, each = whole.config, ranks.parts // ranks.count
        own = slice(ranks.rank * each, (ranks.rank + 1) * each + 1)
        down, size = whole.layers[0].mlp.down_proj.scales, c.num_heads // c.num_kv_heads
        group = c.intermediate_size // (1 if down is None else down.shape[1])
        heads = bounds(c.num_heads, ranks.parts, (size,))[own]
        inner = bounds(c.intermediate_size, ranks.parts, (group, 128, 64, 32, 16))[own]
        keys = [heads[0] // size, -(-heads[-1] // size)]
        if keys[1] - keys[0] > 1 and (heads[0] % size or heads[-1] % size):
            raise BadInput(f"{c.num_heads} heads in groups of {size} are no {ranks.parts} parts; use fewer")
        self.ranks, self.whole, self.tokens = ranks, whole, bounds(c.vocab_size, ranks.count)
        # All inputs, those where its parts begin and end, and where its rows of matrices do.
        self.inputs = {"o_proj": c.num_heads * c.head_dim, "down_proj": c.intermediate_size}
        self.columns = {"o_proj": [c.head_dim * head for head in heads], "down_proj": inner}
        kv, tokens = [c.head_dim * key for key in keys], self.tokens[ranks.rank : ranks.rank + 2]
        self.rows = dict(zip(ROWS, (self.columns["o_proj"], kv, kv, inner, inner, tokens, tokens)))
        counts = {"num_heads": heads[-1] - heads[0], "num_kv_heads": keys[1] - keys[0]}
        self.config = replace(c, **counts, intermediate_size=inner[-1] - inner[0])

    def model(self, q: Quantization | None) -> Transformer:
        """Places for the weights of this process, on the meta device, quantized like `q`."""
        with torch.device("meta"):
            model = Transformer(replace(self.config, vocab_size=len(range(*self.rows["lm_head"]))))
        model, model.config = model.to(self.whole.norm.weight.dtype), self.config
        if q is not None:
            permuted = {path for path, linear in named_linears(self.whole) if linear.permutation is not None}
            reshape(model, q, frozenset(part for path in permuted for part in model.parts(path, 0)))
        return model

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """Of a tensor of a checkpoint, what this process has."""
        *_, module, kind = name.split(".")
        if module in self.columns and kind != "bias":
            return part_of(tensor, self.inputs[module], self.columns[module][0], self.columns[module][-1])
        if module in self.rows and kind != "permutation":
            return tensor[self.rows[module][0] : self.rows[module][-1]]
        return tensor

    def join(self, model: Transformer) -> None:
        """Have a model whose weights are in place, in rows, work with those of the other processes."""
        for layer in model.layers:
            layer.self_attn.o_proj = Summed(layer.self_attn.o_proj, self.columns["o_proj"], self.ranks)
            layer.mlp.down_proj = Summed(layer.mlp.down_proj, self.columns["down_proj"], self.ranks)
        if self.ranks.group:
            model.embed_tokens = SplitEmbedding(model.embed_tokens, self.tokens, self.ranks)
            model.lm_head = SplitHead(model.lm_head, self.tokens, self.ranks)
            model.clock = self.ranks.now


class Summed(nn.Module):
    """A linear whose outputs are sums of parts, each over some inputs. Called like `Linear`."""

    def __init__(self, linear: Linear, bounds: list[int], ranks: Ranks):
        """`linear`: over the inputs of this process, from bounds[0] to bounds[-1], its weights in rows."""
        super().__init__()
        self.bounds, self.ranks, self.bias = [b - bounds[0] for b in bounds], ranks, linear.bias
        self.parts = nn.ModuleList()
        for begin, end in zip(self.bounds, self.bounds[1:]):
            with torch.device("meta"):
                part = Linear(end - begin, linear.out_features)
            tensors = (linear.weight, linear.scales, linear.zeros)
            cut = (t if t is None else part_of(t, linear.in_features, begin, end) for t in tensors)
            part.set_weights(*(t if t is None else t.contiguous() for t in cut))
            part.float32_out = True
            self.parts.append(part)

    def forward(self, x: Tensor, gated: bool = False, residual: Tensor | None = None) -> Tensor:
        halves = x.unflatten(-1, (2 if gated else 1, -1))  # [B, n, gate and up, or 1, inputs]
        own = [halves[..., a:b].flatten(-2) for a, b in zip(self.bounds, self.bounds[1:])]
        sums = torch.stack([part(inputs, None, gated) for part, inputs in zip(self.parts, own)])
        total = self.ranks.total(sums)  # [parts, B, n, out] -> [B, n, out], float32
        return sum((more for more in (self.bias, residual) if more is not None), total).to(x.dtype)


class SplitEmbedding(Embedding):
    """The states of all tokens, of which this process has some: of bounds[rank] to bounds[rank + 1]."""

    def __init__(self, own: Embedding, bounds: list[int], ranks: Ranks):
        nn.Module.__init__(self)
        self.weight, self.num_embeddings, self.embedding_dim = own.weight, bounds[-1], own.embedding_dim
        self.begin, self.end, self.ranks = *bounds[ranks.rank : ranks.rank + 2], ranks

    def forward(self, tokens: Tensor) -> Tensor:
        known = tokens.clamp(max=self.num_embeddings - 1)
        states = kernels.embedding(self.weight, known.clamp(self.begin, self.end - 1) - self.begin)
        here = (self.begin <= known) & (known < self.end)  # others add zeros
        return self.ranks.total(torch.where(here[..., None], states, 0)[None])


class SplitHead(nn.Module):
    """Logits of all tokens, of which every process computes some. As `LanguageHead`."""

    def __init__(self, own: LanguageHead, bounds: list[int], ranks: Ranks):
        super().__init__()
        self.own, self.bounds, self.ranks, self.out_features = own, bounds, ranks, bounds[-1]

    weight = property(lambda self: self.own.weight)  # which a tied embedding shares

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        counts = [end - begin for begin, end in zip(self.bounds, self.bounds[1:])]
        logits = F.pad(self.own(x, norm), (0, max(counts) - self.own.out_features))  # [B, n, most rows]
        every = self.ranks.gather(logits[None])  # [ranks, B, n, most rows]
        return torch.cat([part[..., :count] for part, count in zip(every, counts)], dim=-1)

    def rows(self, ids: Tensor) -> SplitHead:
        """As in `LanguageHead`; `ids` ascend. Where none is its own, a process computes one for nobody."""
        places = torch.searchsorted(ids, torch.tensor(self.bounds, device=ids.device)).tolist()
        begin, end = self.bounds[self.ranks.rank : self.ranks.rank + 2]
        own = ids[(begin <= ids) & (ids < end)] - begin
        return SplitHead(self.own.rows(own if len(own) else ids[:1] * 0), places, self.ranks)
