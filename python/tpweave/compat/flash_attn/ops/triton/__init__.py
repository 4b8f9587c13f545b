"""flash-attn's `ops.triton`: the rotary launcher, on any device."""
