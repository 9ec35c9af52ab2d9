"""GPT-2 in plain torch. Imports nothing else of millrace, so it can be read and used on its own.

from model import load_model, load_tokenizer
gpt2, tokenizer = load_model("demo"), load_tokenizer("demo")
gpt2.logits(torch.tensor([tokenizer.encode("Hello.")]))     # [1, 2, 50257]
"""

from model.gpt2 import GPT2, GPT2Config
from model.tokenizer import Tokenizer, load_tokenizer
from model.weights import ModelError, load_model

__all__ = ["GPT2", "GPT2Config", "ModelError", "Tokenizer", "load_model", "load_tokenizer"]
