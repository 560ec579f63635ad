"""A local Hugging Face folder, looked through before transformers reads any of it.

Read are `config.json`, `tokenizer.json` and safetensors; nothing that could run code, nothing
outside the folder, nothing from the network.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from spanvla_ros.model.backbone import BACKBONES
from spanvla_ros.model.prompt import MARKS, read_tokenizer
from spanvla_ros.types import SpanvlaError, read_json

transformers_logging.disable_progress_bar()

CONFIG_JSON, TOKENIZER_JSON = 'config.json', 'tokenizer.json'
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
PICKLED = ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.pickle')
PREPROCESSOR_JSON = 'preprocessor_config.json'


def is_network_folder(folder: str | Path) -> bool:
    """Whether this looks like a Hugging Face model folder, not like a model directory of ours."""
    return (Path(folder) / CONFIG_JSON).is_file()


def family_of(folder: str | Path) -> str:
    """The family of a folder, by the `model_type` of its config.json."""
    content = read_json(Path(folder) / CONFIG_JSON, 'fetch it again')
    kind = content.get('model_type')
    if kind not in BACKBONES:
        raise SpanvlaError(
            f'{folder}: model_type is {kind!r}; known backbones are {", ".join(BACKBONES)}'
        )
    return str(kind)


def load_network(folder: str | Path) -> nn.Module:
    """The network of a folder in fp32, after `check_folder`; never looks beyond this machine.

    Raises:
        SpanvlaError: the folder is not whole, not safe, or transformers cannot read it.
    """
    path = Path(folder)
    family = check_folder(path)
    try:
        network, about = BACKBONES[family].network_class.from_pretrained(
            str(path),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpanvlaError(
            f'{path}: transformers cannot read this {family} ({line:.200}); fetch it again'
        ) from error
    if missing := sorted(about['missing_keys']):
        raise SpanvlaError(f'{path}: its weights lack {missing[0]}; fetch the folder again')
    found: nn.Module = network.eval()
    return found


def check_folder(folder: str | Path) -> str:
    """Look through a folder without loading it, and return its family.

    Raises:
        SpanvlaError: a file is missing, weights are pickled, a shard lies outside, or tokenizer,
            configuration and weights disagree on the vocabulary.
    """
    path = Path(folder)
    if not (path / CONFIG_JSON).is_file():
        raise SpanvlaError(f'{path}: holds no {CONFIG_JSON}; name a Hugging Face model folder')
    family = family_of(path)
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in PICKLED)
    if pickled:
        raise SpanvlaError(
            f'{path}: {pickled[0]} is a pickle, which could run code; keep safetensors only'
        )
    if not (path / TOKENIZER_JSON).is_file():
        raise SpanvlaError(f'{path}: holds no {TOKENIZER_JSON}; save its tokenizer there')
    config = _config(path, family)
    vocabulary = int(config.get_text_config().vocab_size)
    _check_tokens(path, family, vocabulary, int(config.image_token_id))
    _check_weights(path, weight_files(path), vocabulary)
    _check_pixels(path, family)
    return family


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder, those an index names or the single one."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        raise SpanvlaError(f'{folder}: holds no {WEIGHTS}; fetch the folder again')
    index = read_json(folder / INDEX, 'fetch it again').get('weight_map')
    if not isinstance(index, dict) or not index:
        raise SpanvlaError(f'{folder}: {INDEX} names no weights; fetch the folder again')
    names = sorted(set(index.values()), key=str)
    for name in names:
        if not isinstance(name, str) or PurePosixPath(name).name != name or '\\' in name:
            raise SpanvlaError(f'{folder}: {INDEX} names {name!r}, outside the folder; refused')
        if not name.endswith('.safetensors'):
            raise SpanvlaError(f'{folder}: {INDEX} names {name}, which is no safetensors; refused')
        if not (folder / name).is_file():
            raise SpanvlaError(f'{folder}: shard {name} is missing; fetch the folder again')
    return tuple(folder / name for name in names)


def _config(folder: Path, family: str) -> Any:
    try:
        return BACKBONES[family].network_class.config_class.from_pretrained(
            str(folder), local_files_only=True
        )
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpanvlaError(
            f'{folder}: {CONFIG_JSON} is no {family} configuration ({line:.200}); fetch it again'
        ) from error


def _check_tokens(folder: Path, family: str, vocabulary: int, image_id: int) -> None:
    tokenizer = read_tokenizer(folder / TOKENIZER_JSON)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= vocabulary:
        raise SpanvlaError(
            f'{folder}: {TOKENIZER_JSON} has token {highest}, {CONFIG_JSON} a vocabulary of '
            f'{vocabulary}; take both from one model'
        )
    image = MARKS[family].image
    if tokenizer.token_to_id(image) != image_id:
        raise SpanvlaError(
            f'{folder}: {image} is token {tokenizer.token_to_id(image)} in {TOKENIZER_JSON} and '
            f'{image_id} in {CONFIG_JSON}; take both from one model'
        )


def _check_weights(folder: Path, files: tuple[Path, ...], vocabulary: int) -> None:
    for path in files:
        try:
            with safe_open(str(path), 'np') as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    rows = tensors.get_slice(name).get_shape()[:1]
                    if name.endswith('embed_tokens.weight') and rows != [vocabulary]:
                        raise SpanvlaError(
                            f'{folder}: {path.name} has {rows[0]} token vectors, {CONFIG_JSON} '
                            f'a vocabulary of {vocabulary}; take both from one model'
                        )
        except (SafetensorError, OSError) as error:  # noqa: PERF203 (a few shards)
            raise SpanvlaError(f'{path}: not readable as safetensors; fetch it again') from error


def _check_pixels(folder: Path, family: str) -> None:
    """A folder whose pictures are scaled otherwise than its family's would see wrongly."""
    if not (folder / PREPROCESSOR_JSON).is_file():
        return
    content = read_json(folder / PREPROCESSOR_JSON, 'fetch it again')
    kind = BACKBONES[family]
    for name, ours in (('image_mean', kind.pixel_mean), ('image_std', kind.pixel_std)):
        theirs = content.get(name, ours)
        if len(theirs) != 3 or any(abs(a - b) > 1e-4 for a, b in zip(theirs, ours, strict=True)):
            raise SpanvlaError(
                f'{folder}: {PREPROCESSOR_JSON} has {name} {theirs}, {family} is run with '
                f'{list(ours)}; use a folder with these'
            )
