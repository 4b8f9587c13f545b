"""What a model family's table says: which modules do what, by class name and by the names of their children.

A table is data. `plan.py` reads it, and nothing else in the package knows a model by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block: its four linear layers and the module that calls the attention function.

    Attributes:
        module: class name of the block.
        q, k, v, o: paths of the linear layers below it.
        core: path below it of the module that calls the attention function; "" for the block itself.
        head_dim: attribute of the core with the size of a head.
        local_attributes: attributes of the core to set: name -> this rank's "q_heads", "q_size" or "groups".
        head_norms: children of the core that are norms over each head's dims.
        cross: class names of cores whose keys and values come from another input than the queries.
    """

    module: str
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    core: str = ""
    head_dim: str = "head_dim"
    local_attributes: Mapping[str, str] = field(default_factory=lambda: {"num_key_value_groups": "groups"})
    head_norms: tuple[str, ...] = ()
    cross: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GatedMLPSpec:
    """A module that computes `down(act(gate(x)) * up(x))`.

    Attributes:
        module: class name.
        gate, up, down: names of its linear layers.
        activation: attribute of the config that names the activation.
    """

    module: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "hidden_act"


@dataclass(frozen=True)
class MLPSpec:
    """Two linear layers with an elementwise activation between them, somewhere below a module.

    Attributes:
        module: class name of the module.
        up, down: paths of the linear layers below it.
    """

    module: str
    up: str
    down: str


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: `config.model_type` of its models.
        attention: attention blocks.
        gated_mlps, mlps: MLPs.
        embeddings: (class name, child) of token embeddings, divided by vocabulary.
        heads: (class name, child) of linear layers onto the vocabulary, divided likewise; their output is gathered.
        aliases: (class name, parameter) of parameters outside the swapped modules that are tied to swapped ones.
        rms_norms: class name -> attribute with eps.
        layer_norms: whether `nn.LayerNorm`s are swapped.
        reasons: class name -> why such a module is left alone on purpose.
    """

    name: str
    attention: tuple[AttentionSpec, ...]
    gated_mlps: tuple[GatedMLPSpec, ...] = ()
    mlps: tuple[MLPSpec, ...] = ()
    embeddings: tuple[tuple[str, str], ...] = ()
    heads: tuple[tuple[str, str], ...] = ()
    aliases: frozenset[tuple[str, str]] = frozenset()
    rms_norms: Mapping[str, str] = field(default_factory=dict)
    layer_norms: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)
