"""flash-attn's `layers`: rotary embedding."""
