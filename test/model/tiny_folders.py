"""Hugging Face folders of every family, tiny and random, written by transformers itself."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from spanvla_ros.model.prompt import MARKS, WORDS

FAMILIES = ('qwen2_5_vl', 'internvl', 'qwen3_vl', 'smolvlm')
HIDDEN = 64


def tokenizer_of(family):
    """A byte-level BPE tokenizer, as the real ones are, with the family's marks."""
    marks = MARKS[family]
    names = {marks.padding, marks.turn_start, marks.turn_end, marks.image, marks.image_end}
    names |= {part + '>' for part in marks.image_start.split('>') if part}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=sorted(names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    return tokenizer


def _text(kind, **more):
    return {
        'model_type': kind,
        'hidden_size': HIDDEN,
        'num_hidden_layers': 5,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'intermediate_size': 96,
        'max_position_embeddings': 4096,
        **more,
    }


def _mrope(sections):
    return {'rope_type': 'default', 'rope_theta': 1e6, 'mrope_section': sections}


def _qwen2_5(ids, vocabulary):
    config = Qwen2_5_VLConfig(
        text_config=_text(
            'qwen2_5_vl_text', vocab_size=vocabulary, rope_parameters=_mrope([2, 3, 3])
        ),
        vision_config={
            'depth': 3, 'hidden_size': 32, 'num_heads': 2, 'intermediate_size': 48,
            'out_hidden_size': HIDDEN, 'patch_size': 14, 'window_size': 112,
            'fullatt_block_indexes': [1],
        },
        tie_word_embeddings=True,
        **ids,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen2_5_3b(ids, vocabulary, layers):
    """The released 3B configuration in all widths, with few layers and words."""
    config = Qwen2_5_VLConfig(
        text_config={
            'hidden_size': 2048, 'num_hidden_layers': layers, 'num_attention_heads': 16,
            'num_key_value_heads': 2, 'intermediate_size': 11008, 'vocab_size': vocabulary,
            'max_position_embeddings': 128000, 'rms_norm_eps': 1e-6,
            'rope_parameters': _mrope([16, 24, 24]),
        },
        vision_config={
            'depth': layers, 'hidden_size': 1280, 'num_heads': 16, 'intermediate_size': 3420,
            'out_hidden_size': 2048, 'patch_size': 14, 'window_size': 112,
            'fullatt_block_indexes': [layers - 1],
        },
        tie_word_embeddings=True,
        **ids,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _internvl(ids, vocabulary):
    config = InternVLConfig(
        text_config=_text('qwen2', vocab_size=vocabulary),
        vision_config={
            'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 2,
            'intermediate_size': 48, 'image_size': 112, 'patch_size': 14, 'use_qk_norm': True,
            'norm_type': 'rms_norm', 'attention_bias': True,
        },
        image_token_id=ids['image_token_id'],
        tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def _qwen3(ids, vocabulary):
    config = Qwen3VLConfig(
        # Heads are wider here than the hidden size divided among them.
        text_config=_text(
            'qwen3_vl_text', vocab_size=vocabulary, head_dim=24, rope_parameters=_mrope([4, 4, 4])
        ),
        vision_config={
            'depth': 4, 'hidden_size': 32, 'num_heads': 2, 'intermediate_size': 48,
            'out_hidden_size': HIDDEN, 'patch_size': 16, 'num_position_embeddings': 36,
            'deepstack_visual_indexes': [0, 2],
        },
        tie_word_embeddings=True,
        **ids,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def _smolvlm(ids, vocabulary):
    config = SmolVLMConfig(
        text_config=_text('llama', vocab_size=vocabulary, pad_token_id=0),
        vision_config={
            'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 2,
            'intermediate_size': 48, 'image_size': 128, 'patch_size': 16,
        },
        image_token_id=ids['image_token_id'],
        scale_factor=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return SmolVLMForConditionalGeneration(config)


_MAKERS = {
    'qwen2_5_vl': _qwen2_5, 'internvl': _internvl, 'qwen3_vl': _qwen3, 'smolvlm': _smolvlm,
}  # fmt: skip


def ids_of(family, tokenizer):
    """Special ids as a configuration of the family names them."""
    marks = MARKS[family]
    ids = {'image_token_id': tokenizer.token_to_id(marks.image)}
    ids['video_token_id'] = tokenizer.token_to_id(marks.padding)
    if family.startswith('qwen'):
        ids['vision_start_token_id'] = tokenizer.token_to_id(marks.image_start)
        ids['vision_end_token_id'] = tokenizer.token_to_id(marks.image_end)
    return ids


def network_of(family, tokenizer, seed=0):
    """A random network whose every weight matters: nothing stays zero or one."""
    ids = ids_of(family, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _MAKERS[family](ids, tokenizer.get_vocab_size() + 12)
        with torch.no_grad():
            for weight in network.parameters():
                fan_in = weight[0].numel() if weight.dim() > 1 else 1
                spread = 0.2 if weight.dim() < 2 else min(1.0, 1.5 * fan_in**-0.5)
                middle = 1.0 if weight.dim() < 2 and float(weight.detach().mean()) == 1.0 else 0.0
                weight.copy_(middle + spread * torch.randn(weight.shape))
    return network.eval()


def write_folder(folder, family, seed=0):
    """A folder as `save_pretrained` leaves it, tokenizer included."""
    tokenizer = tokenizer_of(family)
    network_of(family, tokenizer, seed).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
