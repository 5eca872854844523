"""A tokenizer of 50 tokens, single characters and a few words, for the model of conftest."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 50
EOS = (0, 31)
TOKENS = ("<eos>", *"abcdefghijklmnopqrstuvwxyz0123", "<end>", *'456789{}[]":,.-', "ab", "null", "true")


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(TOKENS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([TOKENS[token_id] for token_id in EOS])
    return tokenizer
