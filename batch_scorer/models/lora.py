"""LoRA adapters as PEFT saves them: which tensors of the base they change, and by what.

Here an adapter's config and headers become a plan, and everything in the adapter that the plan has
no place for is an error. `weights.py` does the sums, while the base's tensors are read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import Any, TypeAlias

from batch_scorer.errors import ModelError
from batch_scorer.models.adapter import Delta, ModelConfig, ModelFiles, Source
from batch_scorer.models.checkpoint import HEADS, read_header, unwrapped
from batch_scorer.models.files import read_json, read_pickled
from batch_scorer.models.quantised import quantisation_of, read_quantised
from batch_scorer.models.registry import is_head_name
from batch_scorer.models.sizes import PATTERNS, TEXT, TEXTS, Kind, check_kinds

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""Of the two, the first that is there counts, as in PEFT."""

Names: TypeAlias = Mapping[str, list[int]]

_WITHOUT_EFFECT = frozenset(
    {
        # What is known from the tensors, or read below.
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
        *("lora_bias", "fan_in_fan_out", "init_lora_weights", "modules_to_save"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "ensure_weight_tying"),
        # What matters to training only.
        *("lora_dropout", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"),
        *("qalora_group_size", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
    }
)
"""Entries of an adapter's config that may have any value; all others must be empty or false."""

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), PATTERNS),
    **dict.fromkeys(("target_modules", "modules_to_save"), TEXTS),
    **dict.fromkeys(("peft_type", "task_type", "bias"), TEXT),
}

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin training that leave the base as it was."""

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.default)?(\.(?P<field>weight|bias))?"
)
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_VOCABULARY = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_LANGUAGE_HEADS = (
    *("lm_head.", "embed_out.", "cls.", "decoder.weight", "decoder.bias", "lm_predictions."),
    *("mask_predictions.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
)
_OUTPUTS = ("lm_head.weight", "embed_out.weight")
_LABELLED = (
    *("score.weight", "classifier.weight", "classifier.out_proj.weight"),
    "classification_head.out_proj.weight",
)
_STORED_AS_IN_OUT = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose layers are transformers' Conv1D, which stores [in, out]."""

_OPENRLHF = ("normalize_reward", "value_head_prefix", "mean", "std")
"""Entries that OpenRLHF adds to the config beside an adapter."""
_CLASSIFIERS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class _Stored:
    shape: list[int]
    source: Source


def lora_files(lora_dir: Path) -> list[Path]:
    """The files of an adapter that can change a score; the tokenizer's are not among them.

    Raises ModelError where there are no weights.
    """
    beside = [lora_dir / name for name in (ADAPTER_CONFIG, "config.json", *HEADS)]
    return [_weights(lora_dir), *(file for file in beside if file.is_file())]


def merge_lora(base: ModelFiles, lora_dir: Path) -> ModelFiles:
    """The files of the model that base and adapter make together.

    Raises ModelError for an adapter that is damaged, does not fit the base, or uses what is not
    supported here.
    """
    config = read_json(lora_dir / ADAPTER_CONFIG)
    check_kinds(lora_dir / ADAPTER_CONFIG, config, _KINDS)
    _refuse_unsupported(lora_dir, config)
    if stated := quantisation_of(base.config):
        raise ModelError(
            f"{lora_dir}: its base {base.path} is quantised ({stated.get('quant_method')}); name "
            "the checkpoint that it was made from: --base-model"
        )
    base = read_quantised(base)
    parts, whole = _parts(lora_dir)
    touched = {*whole, *(f"{module}.weight" for module in parts)}
    made = _as_trained(base, lora_dir, config, touched)
    shapes, sources = dict(made.shapes), dict(made.sources)
    _untie(made.config, config, shapes, sources, touched)
    changes = [_replaced(lora_dir, whole, shapes, sources)] if whole else []
    made = replace(made, config=_with_labels(made.config, whole))
    resized = _vocabulary(made, shapes)
    if resized != made.config:
        changes.append(f"vocabulary of {_entry(resized, 'vocab_size')} tokens, as in the adapter")
    merged = replace(made, config=resized, shapes=shapes, sources=sources, lora_dir=lora_dir)
    deltas, lines = _deltas(merged, lora_dir, config, parts)
    _check_targets(lora_dir, config, made, parts)
    return replace(merged, deltas=deltas, changes=(*made.changes, *changes, *lines))


def lost_head(files: ModelFiles) -> str | None:
    """Why an adapter and its base have no score head; None where they have one, or there is no
    adapter."""
    if files.lora_dir is None or any(map(_is_score_head, files.shapes)):
        return None
    return _lost(files.lora_dir)


# What an adapter holds


def _weights(lora_dir: Path) -> Path:
    for name in ADAPTER_WEIGHTS:
        if (lora_dir / name).is_file():
            return lora_dir / name
    names = " or ".join(ADAPTER_WEIGHTS)
    raise ModelError(f"{lora_dir}: a LoRA adapter without weights (no {names})")


def _headers(file: Path) -> dict[str, _Stored]:
    if file.suffix == ".safetensors":
        tensors = {n: (stored.shape, stored.dtype) for n, stored in read_header(file).items()}
    else:
        pickled = read_pickled(file)
        # In safetensors the digest finds them.
        if broken := [name for name, tensor in pickled.items() if not tensor.isfinite().all()]:
            raise ModelError(f"{file}: {broken[0]} holds NaN or infinity")
        tensors = {
            name: (list(tensor.shape), _DTYPES.get(str(tensor.dtype), str(tensor.dtype)))
            for name, tensor in pickled.items()
        }
    return {n: _Stored(shape, Source(file, n, dtype)) for n, (shape, dtype) in tensors.items()}


def _read(lora_dir: Path) -> dict[str, _Stored]:
    """The adapter's tensors under the names that they have in the model it was trained in."""
    file = _weights(lora_dir)
    stored = _headers(file)
    if empty := sorted(name for name, tensor in stored.items() if prod(tensor.shape) == 0):
        raise ModelError(
            f"{file}: {empty[0]} is there without values, as DeepSpeed ZeRO-3 leaves tensors that "
            "it did not gather before saving; save the adapter again with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    found: dict[str, _Stored] = {}
    for name, tensor in stored.items():
        plain, _ = unwrapped(name)
        if plain in found:
            raise ModelError(f"{file}: {plain} is there twice, the second time as {name}")
        if ".original_module." not in plain:  # old PEFT saved the base's beside the trained one
            found[plain] = tensor
    return found


def _of_module(name: str) -> str:
    """A tensor's name without what PEFT puts between a module's name and the tensor's."""
    for between in ("modules_to_save.default.", "modules_to_save.", "base_layer."):
        name = name.replace(f".{between}", ".")
    return name


def _parts(lora_dir: Path) -> tuple[dict[str, dict[str, _Stored]], dict[str, _Stored]]:
    """What is added to each module, by the module's name and the part's; and the whole tensors."""
    parts: dict[str, dict[str, _Stored]] = defaultdict(dict)
    whole: dict[str, _Stored] = {}
    for name, stored in _read(lora_dir).items():
        known = _PART.fullmatch(name)
        if known is None:
            whole[_of_module(name)] = stored
        else:
            part, is_bias = known["part"], known["field"] == "bias"
            parts[known["module"]][f"{part}.bias" if is_bias else part] = stored
    for file in HEADS:
        if (lora_dir / file).is_file():
            whole |= _headers(lora_dir / file)
    return parts, whole


def _refuse_unsupported(lora_dir: Path, config: Mapping[str, Any]) -> None:
    merge = "merge it with PEFT (merge_and_unload) and score what that saves"
    if str(config.get("peft_type")) != "LORA":
        raise ModelError(
            f"{lora_dir}: an adapter of type {config.get('peft_type')}; only LORA is merged here: "
            f"{merge}"
        )
    for name, value in config.items():
        if name not in _WITHOUT_EFFECT and value:
            raise ModelError(
                f"{lora_dir / ADAPTER_CONFIG} sets {name}, which is not known here: {merge}"
            )
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        raise ModelError(
            f"{lora_dir}: init_lora_weights is {config['init_lora_weights']}, so the adapter "
            "belongs to a base that was changed before training; have PEFT convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise ModelError(f"{lora_dir / ADAPTER_CONFIG}: no such bias is known: {config['bias']}")
    for name in ("r", "lora_alpha"):
        values = [config.get(name, 8), *(config.get(_PATTERNS[name]) or {}).values()]
        if wrong := [v for v in values if not isinstance(v, int | float) or v <= 0]:
            raise ModelError(
                f"{lora_dir / ADAPTER_CONFIG}: {name} is {wrong[0]}; it must be a number above 0"
            )


_PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def _for_module(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first key that ends the module's name; a key is a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


# Where it goes


def _as_trained(
    base: ModelFiles, lora_dir: Path, config: Mapping[str, Any], touched: Iterable[str]
) -> ModelFiles:
    """The base as the class of model that the adapter was trained in."""
    beside = read_json(lora_dir / "config.json") if (lora_dir / "config.json").is_file() else {}
    trained = {name: beside[name] for name in _OPENRLHF if name in beside}
    if trained.keys() & {"normalize_reward", "value_head_prefix"}:
        trained["architectures"] = ["RewardModel"]
    elif (task := str(config.get("task_type"))) in _CLASSIFIERS and not _is_reward_model(base):
        from transformers.models.auto import modeling_auto  # takes seconds

        classes = getattr(modeling_auto, _CLASSIFIERS[task])
        if classifier := classes.get(base.config.get("model_type")):
            trained["architectures"] = [classifier]
    if "architectures" not in trained:
        return replace(base, config={**base.config, **trained})
    # The model that was trained had no language head, so nobody would take the base's.
    heads = {name for name in base.shapes if name.startswith(_LANGUAGE_HEADS)} - set(touched)
    left_out = f"not in the model that was trained: {', '.join(sorted(heads))}"
    return replace(
        base,
        config={**base.config, **trained},
        shapes={name: shape for name, shape in base.shapes.items() if name not in heads},
        sources={name: source for name, source in base.sources.items() if name not in heads},
        changes=(*base.changes, *([left_out] if heads else [])),
    )


def _is_reward_model(base: ModelFiles) -> bool:
    return "Reward" in base.architecture or any(
        word in base.architecture for word in ("ForSequenceClassification", "ForTokenClass")
    )


def _place(name: str, known: Names) -> str | None:
    """The base's name of a tensor; checkpoints have or lack the body's prefix (`model.`)."""
    if name in known:
        return name
    prefixes = dict.fromkeys(other.split(".", 1)[0] for other in known)
    candidates = [name.split(".", 1)[-1], *(f"{prefix}.{name}" for prefix in prefixes)]
    return next((candidate for candidate in candidates if candidate in known), None)


def _no_place(lora_dir: Path, name: str) -> str:
    if _is_score_head(name):
        return f"{_lost(lora_dir)} (it changes {name}, which is nowhere)"
    return (
        f"{lora_dir}: it changes {name}, which the base does not have: another base, or a model of "
        "another class; --base-model names the base"
    )


def _untie(
    model_config: ModelConfig,
    config: Mapping[str, Any],
    shapes: dict[str, list[int]],
    sources: dict[str, Source],
    touched: set[str],
) -> None:
    """Give a tied language head a name of its own where PEFT changes one of the two only."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    is_tied = (
        "ForCausalLM" in str(model_config.get("architectures"))
        and model_config.get("tie_word_embeddings") is not False
        and head not in shapes
        and embedding in shapes
    )
    stays_tied = config.get("ensure_weight_tying") is True
    if is_tied and (head in touched or (embedding in touched and not stays_tied)):
        shapes[head], sources[head] = shapes[embedding], sources[embedding]


def _replaced(
    lora_dir: Path,
    whole: Mapping[str, _Stored],
    shapes: dict[str, list[int]],
    sources: dict[str, Source],
) -> str:
    """Put the tensors that the adapter holds whole in the base's place; a line about them."""
    for name, stored in whole.items():
        place = _place(name, shapes)
        if place is None:
            if not is_head_name(name):
                raise ModelError(_no_place(lora_dir, name))
            place = name
        there = shapes.get(place, stored.shape)
        resizes = place.endswith((*_VOCABULARY, *_OUTPUTS)) and there[1:] == stored.shape[1:]
        if there != stored.shape and not (resizes or is_head_name(place)):
            raise ModelError(
                f"{lora_dir}: {name} is {stored.shape}, and {there} in the base: another base"
            )
        shapes[place], sources[place] = stored.shape, stored.source
    names = sorted(whole)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"taken from the adapter: {', '.join(names[:3])}{more}"


def _with_labels(config: ModelConfig, whole: Mapping[str, _Stored]) -> ModelConfig:
    """The config with as many labels as the adapter's head has outputs: PEFT saves no config."""
    outputs = next((whole[name].shape[0] for name in _LABELLED if name in whole), None)
    if outputs is None or len(config.get("id2label") or {}) == outputs:
        return config
    return {**config, "id2label": {str(i): f"LABEL_{i}" for i in range(outputs)}}


def _vocabulary(base: ModelFiles, shapes: Names) -> ModelConfig:
    """The config with as many tokens as the embedding has now, if the adapter has changed that."""
    for name, shape in shapes.items():
        if name.endswith(_VOCABULARY) and base.shapes.get(name, shape) != shape:
            own = {"vocab_size": shape[0]}
            if "vocab_size" not in base.config and "text_config" in base.config:
                return {**base.config, "text_config": {**base.config["text_config"], **own}}
            return {**base.config, **own}
    return base.config


def _entry(config: ModelConfig, name: str) -> Any:
    return config.get(name) or (config.get("text_config") or {}).get(name)


def _is_stored_in_out(config: ModelConfig, module: str) -> bool:
    in_layer = _LAYER_NUMBER.search(f"{module}.") is not None
    return in_layer and config.get("model_type") in _STORED_AS_IN_OUT


def _deltas(
    model: ModelFiles,
    lora_dir: Path,
    config: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, _Stored]],
) -> tuple[dict[str, Delta], list[str]]:
    """What is added to each of the model's tensors, and lines about it."""
    deltas: dict[str, Delta] = {}
    kinds: Counter[str] = Counter()
    for module, found in parts.items():
        rank = int(_for_module(config.get("rank_pattern"), module, config.get("r", 8)))
        alpha = float(_for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
        target = _place(f"{module}.weight", model.shapes)
        if target is None:
            raise ModelError(_no_place(lora_dir, f"{module}.weight"))
        if target in deltas:
            raise ModelError(f"{lora_dir}: {target} is changed twice, the second time by {module}")
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        delta = _delta(lora_dir, module, found, scale, bool(config.get("use_dora")))
        in_out = _is_stored_in_out(model.config, module)
        delta = replace(delta, transposed="lora_embedding_A" in found or in_out)
        _check_shapes(lora_dir, module, found, rank, model.shapes[target], delta.transposed)
        deltas[target] = delta
        if bias := found.get("lora_B.bias"):
            deltas[_bias_of(lora_dir, target, model.shapes)] = Delta(bias.source, None, scale)
        kinds[f"rank {rank}, alpha {alpha:g}"] += 1
    how = "".join(
        f", {name}"
        for name, setting in (("rank-stabilised", "use_rslora"), ("DoRA", "use_dora"))
        if config.get(setting)
    )
    return deltas, [
        f"LoRA adapter: {count} tensors merged in float32, {kind}{how}"
        for kind, count in sorted(kinds.items())
    ]


def _delta(
    lora_dir: Path, module: str, found: Mapping[str, _Stored], scale: float, is_dora: bool
) -> Delta:
    wanted = ("lora_A", "lora_B")
    if any(part.startswith("lora_embedding") for part in found):
        wanted = ("lora_embedding_A", "lora_embedding_B")
    pair = [*wanted, *(["lora_magnitude_vector"] if is_dora else [])]
    if missing := [part for part in pair if part not in found]:
        raise ModelError(f"{lora_dir}: {module} lacks {', '.join(missing)}")
    if surplus := sorted(found.keys() - {*pair, "lora_B.bias"}):
        raise ModelError(
            f"{lora_dir}: {module} has {surplus[0]}, which its config does not ask for"
        )
    down, up = (found[part].source for part in wanted)
    magnitude = found["lora_magnitude_vector"].source if is_dora else None
    return Delta(up, down, scale, magnitude)


def _check_shapes(
    lora_dir: Path,
    module: str,
    found: Mapping[str, _Stored],
    rank: int,
    there: list[int],
    transposed: bool,
) -> None:
    if len(there) != 2:
        raise ModelError(f"{lora_dir}: {module} is {there}; only matrices and embeddings are known")
    rows, columns = reversed(there) if transposed else there
    wanted = {"A": [rank, columns], "B": [rows, rank], "vector": [rows], "bias": [rows]}
    for part, stored in found.items():
        fits = wanted[re.split(r"[._]", part)[-1]]
        if stored.shape != fits:
            raise ModelError(
                f"{lora_dir}: {part} of {module} is {stored.shape}, and {fits} would fit a base of "
                f"{there} and rank {rank}"
            )


def _bias_of(lora_dir: Path, target: str, shapes: Names) -> str:
    name = target.removesuffix("weight") + "bias"
    if name not in shapes:
        raise ModelError(
            f"{lora_dir}: lora_bias: {target} gets a bias that its layer has no place for; "
            "nothing here can run it"
        )
    return name


def _check_targets(
    lora_dir: Path, config: Mapping[str, Any], base: ModelFiles, parts: Iterable[str]
) -> None:
    """Raise where a target lacks its tensors in some layers: PEFT only warns of it."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(
        config.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
    ):
        return
    changed = {_place(f"{module}.weight", base.shapes) for module in parts}
    stacks = {_LAYER_NUMBER.split(name)[0] for name in changed if name}  # not a vision tower
    layers = next((base.config[name] for name in _LAYERS if name in base.config), None)
    for target in sorted({*targets} - {*(config.get("modules_to_save") or ())}):
        ending = f".{target}.weight"
        for name in base.shapes:
            number = _LAYER_NUMBER.search(name)
            if not name.endswith(ending) or not number or ".experts." in name or name in changed:
                continue
            if name[: number.start()] in stacks and (layers is None or int(number[1]) < layers):
                raise ModelError(
                    f"{lora_dir}: {target} is a target, and {name} has no tensors; the adapter is "
                    "incomplete"
                )


# Heads


def _is_score_head(name: str) -> bool:
    return is_head_name(name) and name not in _OUTPUTS


def _lost(lora_dir: Path) -> str:
    config = read_json(lora_dir / ADAPTER_CONFIG)
    beside = read_json(lora_dir / "config.json") if (lora_dir / "config.json").is_file() else {}
    start = f"{lora_dir}: no score head, neither in the adapter nor in its base: "
    if beside.keys() & {"normalize_reward", "value_head_prefix"}:
        return start + (
            "OpenRLHF's LoRA exports left it out, and it cannot be had back; train again with a "
            "version that saves it (modules_to_save), or without LoRA"
        )
    if config.get("task_type") in _CLASSIFIERS:
        return start + (
            f"task_type is {config['task_type']}, so PEFT should have saved it with the adapter; "
            "save the adapter again from the trained model"
        )
    return start + (
        f"with task_type {config.get('task_type')} PEFT saves it only where modules_to_save names "
        "it, so the trained one is lost; train again with task_type SEQ_CLS"
    )
