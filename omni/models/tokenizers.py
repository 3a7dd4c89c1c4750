"""Tokenizers for random models: each letter is a token, under the class that the pipeline expects."""

from __future__ import annotations

from typing import Any

LETTERS = [chr(code) for code in range(33, 127)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE = {"Qwen2Tokenizer": "\u0120", "T5Tokenizer": "\u2581", "GemmaTokenizer": "\u2581"}
"""How a class writes a space."""


def build_tokenizer(class_name: str, config: Any) -> Any:
    """A tokenizer of a transformers class for the encoder with this config; takes any ASCII text."""
    import transformers

    build = getattr(transformers, class_name)
    if class_name == "CLIPTokenizer":
        letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
        vocab = {letter: number for number, letter in enumerate(letters)}
        vocab |= {"<|startoftext|>": config.bos_token_id, "<|endoftext|>": config.eos_token_id}
        return build(vocab=vocab, merges=[], model_max_length=config.max_position_embeddings)
    letters = [SPACE[class_name], *LETTERS]
    if class_name == "T5Tokenizer":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
        return build(vocab=pieces, extra_ids=0, model_max_length=512)
    if class_name == "GemmaTokenizer":
        specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
        return build(vocab={token: number for number, token in enumerate([*specials, *letters])}, merges=[])
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: number for number, token in enumerate([*letters, "\u010a", *specials])}
    return build(vocab=vocab, merges=[], additional_special_tokens=specials[1:], chat_template=CHAT_TEMPLATE)
