"""flash-attn's `ops`: rotary embedding."""
