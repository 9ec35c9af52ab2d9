"""LoRA adapters in PEFT's format: what their files mean for the decoder, or why they are refused."""
