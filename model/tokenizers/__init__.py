"""Text to tokens and back: GPT-2's own vocabulary with tiktoken, any other with Hugging Face's tokenizers."""
