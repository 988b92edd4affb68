"""Tiny tokenizers and randomly initialised models of transformers, all offline."""

from functools import cache

import torch

import vgf_fast.llm  # noqa: F401  before transformers: it keeps our folder ``kernels`` from being taken for another

WORDS = (
    *("the", "a", "old", "young", "man", "woman", "dog", "cat", "house", "tree", "walks", "sleeps", "runs", "sees"),
    *("in", "on", "under", "near", "big", "small", "red", "green", "and", "quickly", "slowly", "rain", "sun", "river"),
    *("boat", "good", "bad", "very", "happy", "sad", "play"),
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@cache
def wordpiece():
    """WordPiece over WORDS, with pieces ``##s``, ``##ing``, ``##ed`` and an unused token; [CLS] text [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL, "[unused0]", *WORDS, "##s", "##ing", "##ed", ",", "."]
    inner = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


@cache
def byte_pairs():
    """Byte-level BPE trained on a few sentences, nothing around a text; <|end|> ends it and fills rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<|end|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    sentences = [" " + " ".join(WORDS[i:] + WORDS[:i]) for i in range(0, len(WORDS), 3)]
    inner.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def configuration(family, tokenizer, **changes):
    import transformers

    shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3}
    shared["eos_token_id"] = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    shared["bos_token_id"] = None
    if family == "gpt2":
        own = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
        return transformers.GPT2Config(**{**shared, **own, **changes})
    kinds = {"llama": transformers.LlamaConfig, "gpt_neox": transformers.GPTNeoXConfig, "bert": transformers.BertConfig,
             "roberta": transformers.RobertaConfig, "bart": transformers.BartConfig}  # fmt: skip
    if family == "bart":
        own = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
               "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
        return kinds[family](**{**shared, **own, **changes})
    return kinds[family](**{**shared, **SIZES, "max_position_embeddings": 48, **changes})


def classifier(family, tokenizer, seed=0, labels=1, **changes):
    """A sequence classifier with one output, in evaluation mode."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = configuration(family, tokenizer, num_labels=labels, **changes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def causal(family, tokenizer, seed=1, **changes):
    """A causal language model, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(configuration(family, tokenizer, **changes)).eval()
