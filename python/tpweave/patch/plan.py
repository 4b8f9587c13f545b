"""From a family's table and a model to the list of changes that make it parallel. Builds modules, changes nothing.

Replacements are made in units (an attention, an MLP, a norm) that are swapped whole or left alone whole: what one
linear layer divides, its partner must expect divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tpweave.comm.regions import copy_to_ranks
from tpweave.errors import UnsupportedModelError
from tpweave.layers.attention import shard_projections
from tpweave.layers.embedding import VocabParallelEmbedding
from tpweave.layers.heads import HeadSplit
from tpweave.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpweave.layers.mlp import ParallelMLP
from tpweave.layers.norm import LayerNorm, RMSNorm
from tpweave.layers.sharding import Shard, ShardedModule, split_sizes
from tpweave.patch.family import AttentionSpec, Family, GatedMLPSpec, MLPSpec

# Transformers' names of activations -> ours.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CopyInput:
    """A forward pre-hook that passes a module's hidden states through `copy_to_ranks`: one all-reduce in backward for
    all the layers that read them."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (copy_to_ranks(args[0], self.group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": copy_to_ranks(kwargs["hidden_states"], self.group)}


@dataclass
class Swap:
    """One module to be replaced.

    Attributes:
        path: its name in the model.
        original, replacement: the modules.
        parts: pairs of an original module and the sharded module that holds its parameters' parts. Empty where the
            replacement shares the original's parameters.
        note: what this rank holds, for the report.
    """

    path: str
    original: nn.Module
    replacement: nn.Module
    parts: list[tuple[nn.Module, ShardedModule]]
    note: str


@dataclass
class Plan:
    """All changes, in order.

    Attributes:
        swaps: modules to replace.
        attributes: (module, name, value) to set.
        hooks: (module, forward pre-hook) to register.
        adjusted: path -> note, for modules that stay but work on a part.
        refused: path -> reason, for modules that the table would swap but that cannot be.
        attends: whether an attention was divided.
    """

    swaps: list[Swap] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = field(default_factory=list)
    adjusted: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class _Refused(Exception):
    """A unit that cannot be swapped; the argument says why."""


def _has_class(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _joined(path: str, child: str) -> str:
    return f"{path}.{child}" if path and child else path or child


def _check_plain(module: nn.Module | None, wanted: type[nn.Module], name: str) -> Any:
    """`module` if it is exactly a `wanted` that nobody hooked or parametrised."""
    if type(module) is not wanted:
        kind = type(module)
        raise _Refused(f"{name} is a {kind.__module__}.{kind.__name__}, not an nn.{wanted.__name__}")
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise _Refused(f"{name} has hooks, which a replacement would lose")
    return module


def _child(module: nn.Module, path: str) -> Any:
    """The module at `path` below `module`, or None."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


class Planner:
    """Goes through a model by its family's table.

    Args:
        model: the model; it is not changed.
        family: its table.
        group: the `TPGroup`.
        shares: work per rank, as of `parallelize`.
        any_head_map: whether the attention function takes query heads that map unevenly to KV heads.
    """

    def __init__(
        self, model: nn.Module, family: Family, group: Any, shares: Sequence[float] | None, any_head_map: bool
    ) -> None:
        self.model, self.family, self.group, self.shares = model, family, group, shares
        self.any_head_map = any_head_map
        self.plan = Plan()
        self.head_norms: set[str] = set()

    def make(self) -> Plan:
        """The changes for the whole model.

        Raises:
            UnsupportedModelError: tied parameters that cannot be divided alike, or heads that cannot be expressed.
        """
        for spec in self.family.attention:
            self._each(spec.module, functools.partial(self._attention, spec))
        for gated in self.family.gated_mlps:
            self._each(gated.module, functools.partial(self._gated_mlp, gated))
        for mlp in self.family.mlps:
            self._each(mlp.module, functools.partial(self._mlp, mlp))
        for owner, child in self.family.embeddings:
            self._each(owner, self._embedding, child)
        for owner, child in self.family.heads:
            self._each(owner, self._vocab_head, child)
        for name, eps in self.family.rms_norms.items():
            self._each(name, functools.partial(self._rms_norm, eps))
        if self.family.layer_norms:
            self._each("LayerNorm", self._layer_norm)
        self._tie()
        return self.plan

    def _each(self, class_name: str, unit: Callable[[str, Any], None], child: str = "") -> None:
        """Run `unit` on every module of the class, or on the child of each."""
        for owner_path, owner in self.model.named_modules():
            if _has_class(owner, class_name):
                path = _joined(owner_path, child)
                try:
                    unit(path, _child(owner, child))
                except _Refused as refusal:
                    self.plan.refused[path] = str(refusal)

    def _split(self, length: int) -> Shard:
        return Shard.from_sizes(split_sizes(length, self.group.size, self.shares))

    def _column(self, path: str, original: nn.Linear, layer: ColumnParallelLinear, unit: str = "rows") -> None:
        start, stop = layer.shard.ranges[self.group.rank]
        note = f"{unit} {start}:{stop} of {layer.shard.length}"
        self.plan.swaps.append(Swap(path, original, layer, [(original, layer)], note))

    def _row(self, path: str, original: nn.Linear, layer: RowParallelLinear) -> None:
        start, stop = layer.shard.ranges[self.group.rank]
        note = f"columns {start}:{stop} of {layer.shard.length}"
        self.plan.swaps.append(Swap(path, original, layer, [(original, layer)], note))

    def _attention(self, spec: AttentionSpec, path: str, block: nn.Module) -> None:
        names = (spec.q, spec.k, spec.v, spec.o)
        q, k, v, o = (_check_plain(_child(block, name), nn.Linear, name) for name in names)
        core = _child(block, spec.core)
        head_dim = getattr(core, spec.head_dim)
        for name, width in ((spec.q, q.out_features), (spec.k, k.out_features)):
            if width % head_dim:
                raise _Refused(f"{name} has {width} rows, not a multiple of the head size {head_dim}")
        if v.out_features != k.out_features or o.in_features != q.out_features:
            shapes = ", ".join(f"{name} {tuple(m.weight.shape)}" for name, m in zip(names, (q, k, v, o), strict=True))
            raise _Refused(f"the projections do not fit together: {shapes}")
        num_q, num_kv = q.out_features // head_dim, k.out_features // head_dim
        split = HeadSplit.make(num_q, num_kv, head_dim, self.group.size, shares=self.shares)
        if not self.any_head_map:
            for rank in range(self.group.size):
                heads = split.local(rank)
                if heads.num_q == 0 or heads.kv_index is not None:
                    raise UnsupportedModelError(
                        f"attention=False with {num_q} query and {num_kv} KV heads on {self.group.size} ranks: "
                        f"rank {rank} would have {heads.num_q} query heads over {heads.num_kv}, which "
                        "Transformers' functions cannot express. Use attention=True, or a number of ranks that "
                        f"divides {num_kv}."
                    )
        is_cross = any(_has_class(core, name) for name in spec.cross)
        layers = shard_projections(q, k, v, o, split, self.group, copy_kv_input=is_cross)
        for name, original, layer in zip(names[:3], (q, k, v), layers[:3], strict=True):
            self._column(_joined(path, name), original, layer)
        self._row(_joined(path, spec.o), o, layers[3])
        heads = split.local(self.group.rank)
        core_path = _joined(path, spec.core)
        values = {
            "q_heads": heads.num_q,
            "kv_heads": heads.num_kv,
            "q_size": heads.num_q * head_dim,
            "groups": heads.num_q // heads.num_kv,
        }
        self.plan.attributes += [(core, "tpweave_heads", heads), (core, "tpweave_group", self.group)]
        for name, value in spec.local_attributes.items():
            self.plan.attributes.append((core, name, values[value]))
        self.plan.hooks.append((core, CopyInput(self.group)))
        self.head_norms.update(_joined(core_path, name) for name in spec.head_norms)
        (q_start, q_stop), (kv_start, kv_stop) = split.q.ranges[self.group.rank], split.kv.ranges[self.group.rank]
        self.plan.adjusted[core_path] = (
            f"query heads {q_start}:{q_stop} of {num_q}, KV heads {kv_start}:{kv_stop} of {num_kv}"
        )

    def _gated_mlp(self, spec: GatedMLPSpec, path: str, block: nn.Module) -> None:
        gate, up, down = (
            _check_plain(_child(block, name), nn.Linear, name) for name in (spec.gate, spec.up, spec.down)
        )
        if not gate.out_features == up.out_features == down.in_features:
            raise _Refused(f"{spec.gate}, {spec.up} and {spec.down} have different intermediate sizes")
        shard = self._split(up.out_features)
        activation = _ACTIVATIONS.get(getattr(self.model.config, spec.activation))
        if activation is None:
            self._column(_joined(path, spec.gate), gate, ColumnParallelLinear.from_linear(gate, self.group, shard))
            self._mlp_pair(_joined(path, spec.up), up, _joined(path, spec.down), down, shard)
            return
        mlp = ParallelMLP.from_linears(gate, up, down, activation=activation, group=self.group, splits=shard)
        start, stop = shard.ranges[self.group.rank]
        parts: list[Any] = [(gate, mlp.gate_proj), (up, mlp.up_proj), (down, mlp.down_proj)]
        self.plan.swaps.append(Swap(path, block, mlp, parts, f"columns {start}:{stop} of {shard.length}"))

    def _mlp(self, spec: MLPSpec, path: str, block: nn.Module) -> None:
        up, down = (_check_plain(_child(block, name), nn.Linear, name) for name in (spec.up, spec.down))
        if up.out_features != down.in_features:
            raise _Refused(f"{spec.up} has {up.out_features} outputs, {spec.down} {down.in_features} inputs")
        self._mlp_pair(_joined(path, spec.up), up, _joined(path, spec.down), down, self._split(up.out_features))

    def _mlp_pair(self, up_path: str, up: nn.Linear, down_path: str, down: nn.Linear, shard: Shard) -> None:
        self._column(up_path, up, ColumnParallelLinear.from_linear(up, self.group, shard))
        self._row(down_path, down, RowParallelLinear.from_linear(down, self.group, shard))

    def _embedding(self, path: str, embedding: nn.Embedding) -> None:
        _check_plain(embedding, nn.Embedding, "it")
        try:
            layer = VocabParallelEmbedding.from_embedding(embedding, self.group, self._split(embedding.num_embeddings))
        except ValueError as error:
            raise _Refused(str(error)) from error
        start, stop = layer.shard.ranges[self.group.rank]
        self.plan.swaps.append(
            Swap(path, embedding, layer, [(embedding, layer)], f"tokens {start}:{stop} of {layer.shard.length}")
        )

    def _vocab_head(self, path: str, head: nn.Linear) -> None:
        _check_plain(head, nn.Linear, "it")
        shard = self._split(head.out_features)
        layer = ColumnParallelLinear.from_linear(head, self.group, shard, gather_output=True)
        self._column(path, head, layer, unit="tokens")

    def _rms_norm(self, eps: str, path: str, norm: Any) -> None:
        group = self.group if path in self.head_norms else None
        note = "shares the weight" if group is None else "this rank's heads; the weight's gradient is summed over ranks"
        layer = RMSNorm.from_weight(norm.weight, getattr(norm, eps), sum_gradients_over=group)
        self.plan.swaps.append(Swap(path, norm, layer, [], note))

    def _layer_norm(self, path: str, norm: nn.LayerNorm) -> None:
        try:
            layer = LayerNorm.from_layer_norm(_check_plain(norm, nn.LayerNorm, "it"))
        except ValueError as error:
            raise _Refused(str(error)) from error
        self.plan.swaps.append(Swap(path, norm, layer, [], "shares the weight"))

    def _holders(self, parameter: nn.Parameter) -> Iterator[tuple[str, nn.Module, str]]:
        for path, module in self.model.named_modules():
            for name, own in module.named_parameters(recurse=False):
                if own is parameter:
                    yield path, module, name

    def _tie(self) -> None:
        """Parameters that were one stay one."""
        parts = [pair for swap in self.plan.swaps for pair in swap.parts]
        replaced = {id(original): sharded for original, sharded in parts}
        first: dict[int, tuple[nn.Parameter, tuple[int, Shard] | None]] = {}
        for original, sharded in parts:
            for name, parameter in original.named_parameters(recurse=False):
                where = sharded.shards.get(name)
                if id(parameter) not in first:
                    first[id(parameter)] = (getattr(sharded, name), where)
                    self._tie_aliases(parameter, getattr(sharded, name), replaced)
                    continue
                part, known = first[id(parameter)]
                if known != where:
                    raise UnsupportedModelError(f"a tied parameter, {name}, is divided in two ways: {sharded}")
                setattr(sharded, name, part)

    def _tie_aliases(self, parameter: nn.Parameter, part: nn.Parameter, replaced: dict[int, ShardedModule]) -> None:
        for path, module, name in self._holders(parameter):
            if id(module) in replaced:
                continue
            if not any(_has_class(module, owner) and name == alias for owner, alias in self.family.aliases):
                reason = self.plan.refused.get(path, "the table does not divide it")
                raise UnsupportedModelError(
                    f"{_joined(path, name)} is tied to a parameter that is divided, but stays whole itself ({reason})"
                )
            self.plan.attributes.append((module, name, part))
