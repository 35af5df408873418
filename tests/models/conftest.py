import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from dsa.testing.tiny_models import VOCABULARY


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Single letters and `t<number>` words, as many as the tiny models' vocabulary."""
    words = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"t{number}" for number in range(len(words), VOCABULARY)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
