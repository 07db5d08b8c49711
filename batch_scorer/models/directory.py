"""A model directory, read without loading the model: what it is, and a digest of its bytes."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batch_scorer.errors import ConfigError, ModelError
from batch_scorer.judges.page import Page
from batch_scorer.models.adapter import Adapter, ModelFiles, Prompt
from batch_scorer.models.checkpoint import (
    has_weights,
    read_checkpoint,
    refuse_unconverted,
)
from batch_scorer.models.cost import HIDDEN_SIZES, ModelCost, model_cost
from batch_scorer.models.cross_encoder import SETTINGS_FILES, read_cross_encoder
from batch_scorer.models.digests import file_digest
from batch_scorer.models.embedding import is_decoder
from batch_scorer.models.files import check_folder, read_json
from batch_scorer.models.hub import HubName, NotHereError
from batch_scorer.models.hub import fetch as fetch_model
from batch_scorer.models.lora import ADAPTER_CONFIG, lora_files, lost_head, merge_lora
from batch_scorer.models.quantised import Quantisation, describe, read_quantised
from batch_scorer.models.registry import (
    EMBEDDING,
    JUDGE,
    REMOTE_CODE,
    choose_adapter,
    mismatch_of,
    read_vocabulary,
)
from batch_scorer.models.sizes import check_sizes
from batch_scorer.records.digest import digest_of

_CODE = "*.py"
_VOCABULARY = "tokenizer.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZER_ENTRIES = ("model_type", "tokenizer_class", "auto_map", "transformers_version")
_TEMPLATES = "additional_chat_templates/*.jinja"
_UNLIMITED_TOKENS = 10**9


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's files show.

    `changes` are what was done to the files as they are stored, and `doubts` what somebody should
    look at; `unpackable` is why packed attention cannot run the model, None where it can or where
    nobody looked.
    `path` has config and weights, `lora_dir` the LoRA adapter that is merged into them, and
    `tokenizer_path` the tokenizer. `adapter` names the family (`models/families`), `engines` those
    that can run it, and `converts` says whether its body's tensors are made into others;
    `attributes` are its outputs beside the score, and `has_score` whether there is one; `prompt` is
    how it wants conversations rendered (all kept here, because the families need torch, which not
    every process has). `has_steps`: it is a process reward model. `reads_any_token`: its head can
    give every token a score. `is_decoder`: transformers knows its type as one with a causal mask;
    looked up for embeddings only. `hidden_size` is None where the config does not name it, `cost`
    where config and weights do not determine it.
    `positions` are the tokens of the longest sequence that the model can read, `max_tokens` the
    same where the tokenizer's files set a lower limit. `quantisation` is that of the weights as
    they are stored. `digest` covers config, weights and tokenizer files: with any byte changed
    there it is another model. With a LoRA adapter it covers the adapter's files and the base's, and
    `base_digest` the base's alone. `tokenizer_digest` covers what the tokenizer is loaded from,
    chat templates included; "" where that was not read. `reference` is the second model of an
    implicit reward; limits, `vocab_size` and `cost` are then those of both together. `judge` is the
    page that a judge is asked by, and `verdict_ids` the token of each of its choices, where it is
    read by probability.
    `is_served`: it is behind a server, and of all this only the name is known (`served_model`).
    """

    path: Path
    tokenizer_path: Path
    lora_dir: Path | None
    changes: tuple[str, ...]
    doubts: tuple[str, ...]
    unpackable: str | None
    architecture: str
    adapter: str
    engines: tuple[str, ...]
    converts: bool
    attributes: tuple[str, ...]
    has_score: bool
    prompt: Prompt
    has_steps: bool
    reads_any_token: bool
    hidden_size: int | None
    positions: int
    max_tokens: int
    vocab_size: int
    cost: ModelCost | None
    quantisation: Quantisation | None
    digest: str
    base_digest: str | None = None
    reference: "ModelFacts | None" = None
    judge: Page | None = None
    verdict_ids: tuple[int, ...] = ()
    is_decoder: bool = False
    is_served: bool = False
    tokenizer_digest: str = ""

    @property
    def columns_beside(self) -> tuple[str, ...]:
        """The columns of a row that a judge's questions show beside the conversation."""
        return self.judge.read_columns if self.judge else ()


def served_model(name: str, page: Page) -> ModelFacts:
    """A judge that a server knows by this name: its digest is of the name."""
    return ModelFacts(
        path=Path(),
        tokenizer_path=Path(),
        lora_dir=None,
        changes=(),
        doubts=(),
        unpackable=None,
        architecture="served",
        adapter=JUDGE,
        engines=(),
        converts=False,
        attributes=(),
        has_score=True,
        prompt=Prompt(),
        has_steps=False,
        reads_any_token=False,
        hidden_size=None,
        positions=_UNLIMITED_TOKENS,
        max_tokens=_UNLIMITED_TOKENS,
        vocab_size=_UNLIMITED_TOKENS,
        cost=None,
        quantisation=None,
        digest=digest_of({"served": name}),
        judge=page,
        is_served=True,
    )


def find_model(
    name: str, revision: str | None = None, *, with_code: bool = False, fetch: bool = True
) -> Path:
    """The local directory of `name`, which is one or a hub's `ORG/NAME` or `ORG/NAME@REVISION`.

    A hub's model is fetched, `with_code` including its Python files; without `fetch` it must be
    here already. Raises ModelError, also for a folder with files that must not be opened, and
    ConfigError for a revision that nothing can have.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"revision: {name} is a folder, and only a hub's models have one")
        check_folder(path)
        return path.absolute()
    if path.exists():
        raise ModelError(f"{name}: is a file; a model is a directory with config.json and weights")
    hub_name = HubName.parse(name, revision)
    if hub_name is None:
        raise NotHereError(f"{name}: no such model directory")
    path = fetch_model(hub_name, code=with_code, ask=fetch)
    check_folder(path)
    return path


def find_base(path: Path, asked: str | None = None, *, fetch: bool = True) -> Path | None:
    """The local directory of the base of the LoRA adapter in `path`; None: it holds no adapter.

    `asked` is the user's name for the base. Without it, a whole model that lies beside the adapter
    is the base, as in transformers, or else the one that the adapter's config names: a directory
    (also relative to the adapter's), or a hub id. Raises ModelError, and ConfigError for a base
    that nothing asks for.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        if asked is not None:
            raise ConfigError(f"base_model: {path} is no LoRA adapter (no {ADAPTER_CONFIG})")
        return None
    if asked is None and (path / "config.json").is_file() and has_weights(path):
        return path
    stored = read_json(path / ADAPTER_CONFIG)
    name = asked or str(stored.get("base_model_name_or_path") or "")
    if not name:
        raise ModelError(f"{path}: the adapter does not name its base; name it: --base-model")
    if asked is None and not Path(name).is_dir() and (path / name).is_dir():
        name = str(path / name)
    try:
        base = find_model(name, None if asked else stored.get("revision"), fetch=fetch)
    except ModelError as error:
        raise type(error)(f"{path}: its base: {error}; --base-model names another place") from error
    if (base / ADAPTER_CONFIG).is_file() and base != path:
        raise ModelError(
            f"{path}: its base {base} is a LoRA adapter too; merge that one with PEFT "
            "(merge_and_unload), and name the result: --base-model"
        )
    return base


def read_model_files(
    path: Path,
    name: str = "",
    lora_dir: Path | None = None,
    entries: Mapping[str, Any] | None = None,
) -> ModelFiles:
    """Config, with `entries` in place of its own, and safetensors headers, with the adapter in
    `lora_dir` merged into them.

    Raises ModelError for what is damaged or incomplete, or does not fit together.
    """
    refuse_unconverted(path)
    config = {**read_json(path / "config.json"), **(entries or {})}
    check_sizes(path / "config.json", config)
    found = read_checkpoint(path)
    # sentence-transformers writes its files beside what it trained.
    settings = lora_dir if lora_dir and (lora_dir / SETTINGS_FILES[0]).is_file() else path
    files = ModelFiles(
        path=path,
        name=name or path.name,
        config=config,
        shapes=found.shapes,
        sources=found.sources,
        changes=found.changes,
        cross_encoder=read_cross_encoder(settings, config),
    )
    return merge_lora(files, lora_dir) if lora_dir else read_quantised(files)


def inspect_model(
    path: Path,
    name: str = "",
    adapter: str | None = None,
    *,
    base: Path | None = None,
    entries: Mapping[str, Any] | None = None,
    embeds: bool = False,
    trust_remote_code: bool = False,
    with_fit: bool = False,
    with_digest: bool = True,
) -> ModelFacts:
    """Choose the adapter, check that its head is there, digest all bytes.

    `name` is the user's name for the model; `adapter` overrides the choice, `entries` those of the
    config; with a `base`, `path` holds a LoRA adapter of it; with `embeds` no head is needed; with
    `trust_remote_code` the model's own code may score; `with_fit` all tensors have to be those of
    the model (`fit.check_fit`); without `with_digest` the digest is empty and the weights are not
    read. Raises ModelError if no adapter fits, if the model has no safetensors weights, or if the
    head is not among them or of another shape: a head that is missing would be filled with random
    numbers by the loader. Raises ConfigError for entries that do not fit the head.
    """
    files = read_model_files(base or path, name, path if base else None, entries)
    _refuse_empty(files)
    chosen = EMBEDDING
    if not embeds:
        try:
            chosen = choose_adapter(files, adapter, trust_remote_code=trust_remote_code)
        except ModelError as error:
            raise ModelError(lost_head(files) or str(error)) from error
    if base and chosen is REMOTE_CODE:
        raise ModelError(f"{path}: an adapter is not merged into a model that runs its own code")
    refuse_other_width(files, chosen)
    unpackable: str | None = None
    if with_fit:
        from batch_scorer.models import fit  # needs torch, and not every process does

        unpackable = fit.check_fit(
            files, chosen, embeds=embeds, trust_remote_code=trust_remote_code
        )
        if not embeds and chosen is not REMOTE_CODE:
            fit.check_head(files, chosen)
    digest, base_digest = "", None
    if with_digest:
        digest = _digest(_model_files(files, chosen, trust_remote_code))
    if with_digest and files.lora_dir:
        base_digest = digest
        own = [*lora_files(files.lora_dir), *_settings_files(files.lora_dir, chosen)]
        digest = hashlib.sha256(f"{_digest(own)} {base_digest}".encode()).hexdigest()
    pairs = chosen.cross_encoder(files)
    pair_limit = pairs.max_tokens if pairs else None
    own_limit = chosen.max_tokens or pair_limit or _tokenizer_limit(files.tokenizer_path)
    positions = chosen.max_tokens or int(
        files.config.get("max_position_embeddings") or _UNLIMITED_TOKENS
    )
    return ModelFacts(
        path=files.path,
        tokenizer_path=files.tokenizer_path,
        lora_dir=files.lora_dir,
        changes=files.changes,
        doubts=mismatch_of(files, chosen),
        unpackable=unpackable,
        architecture=files.architecture,
        adapter=chosen.name,
        engines=chosen.engines,
        converts=chosen.body.tensors is not None,
        attributes=chosen.attributes(files.config),
        has_score=chosen.has_score(files.config),
        prompt=replace(chosen.prompt, question_prefix=pairs.prompt) if pairs else chosen.prompt,
        has_steps=chosen.step_aggregation is not None,
        reads_any_token=chosen.reads_any_token,
        hidden_size=_hidden_size(files),
        positions=positions,
        max_tokens=min(positions, own_limit or positions),
        vocab_size=int(files.config.get("vocab_size") or _UNLIMITED_TOKENS),
        cost=model_cost(files, chosen),
        quantisation=describe(files),
        digest=digest,
        base_digest=base_digest,
        is_decoder=embeds and is_decoder(files.path),
        tokenizer_digest=_tokenizer_digest(files) if with_digest else "",
    )


def with_reference(policy: ModelFacts, reference: ModelFacts) -> ModelFacts:
    """The facts of two models that read the same tokens.

    One of them may have tokens behind the other's, as where training added some: rows with their
    ids cannot be read by both. Raises ModelError where they have not the same vocabulary otherwise,
    or are one model.
    """
    if policy.digest and policy.digest == reference.digest:
        raise ModelError(
            f"{reference.lora_dir or reference.path}: the reference model is the model itself: "
            "every score would be 0"
        )
    here, there = (
        read_vocabulary(facts.tokenizer_path / _VOCABULARY) for facts in (policy, reference)
    )
    shared = here.keys() & there.keys()
    added = (here | there).items() - {(token, here[token]) for token in shared}
    first = min((place for _, place in added), default=_UNLIMITED_TOKENS)
    are_alike = all(here[token] == there[token] < first for token in shared)
    if not are_alike:
        other = min(here.keys() | there.keys(), key=lambda t: (here.get(t) == there.get(t), t))
        raise ModelError(
            f"{reference.tokenizer_path / _VOCABULARY}: not the vocabulary of {policy.path}: "
            f"{other!r} is {there.get(other, 'no token')} here, {here.get(other, 'no token')} there"
        )
    cost = None
    if policy.cost is not None and reference.cost is not None:
        cost = policy.cost.plus(reference.cost)
    return replace(
        policy,
        positions=min(policy.positions, reference.positions),
        max_tokens=min(policy.max_tokens, reference.positions),
        vocab_size=min(policy.vocab_size, reference.vocab_size, first),
        doubts=policy.doubts if not added else (*policy.doubts, _unshared(len(added), first)),
        cost=cost,
        reference=reference,
    )


def _unshared(count: int, first: int) -> str:
    return (
        f"{count} tokens, from id {first} on, are not in both models' tokenizers: rows that have "
        "them are marked bad_token_id"
    )


def without_reference(policy: ModelFacts) -> ModelFacts:
    """The facts of a policy that is measured against nothing."""
    return replace(policy, attributes=policy.attributes[:1])


def _refuse_empty(files: ModelFiles) -> None:
    empty = sorted(name for name, shape in files.shapes.items() if 0 in shape)
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ModelError(
            f"{files.path}: {empty[0]}{more} is there without values, as DeepSpeed ZeRO-3 leaves "
            "tensors that it did not gather before saving; save the model again with "
            "stage3_gather_16bit_weights_on_model_save, or convert its checkpoint (zero_to_fp32.py)"
        )


def refuse_other_width(files: ModelFiles, adapter: Adapter) -> None:
    """Raise ModelError for a linear head that reads hidden states of another size."""
    hidden_size = _hidden_size(files)
    if hidden_size is None or list(adapter.head.values()) != [(1, None)]:
        return
    (name,) = adapter.head
    shape = files.shapes.get(name)
    if shape and shape[-1] != hidden_size:
        raise ModelError(
            f"{files.path}: {name} is {shape}, and the hidden states have {hidden_size} numbers"
        )


def _hidden_size(files: ModelFiles) -> int | None:
    return next((files.config[n] for n in HIDDEN_SIZES if n in files.config), None)


def _tokenizer_limit(path: Path) -> int | None:
    file = path / "tokenizer_config.json"
    if not file.exists():
        return None
    limit = read_json(file).get("model_max_length")
    # Tokenizers without a limit write 1e30.
    return int(limit) if isinstance(limit, int | float) and limit < _UNLIMITED_TOKENS else None


def _model_files(model: ModelFiles, adapter: Adapter, trust_remote_code: bool) -> list[Path]:
    path = model.path
    stored = {source.file for source in model.sources.values()}
    files = [path / "config.json", *sorted(file for file in stored if file.parent == path)]
    files += sorted(path.glob(_CODE)) if trust_remote_code else []
    files += [path / name for name in adapter.head_files if (path / name).exists()]
    return files + _settings_files(path, adapter)


def _settings_files(path: Path, adapter: Adapter) -> list[Path]:
    """The tokenizer's files, and those of a CrossEncoder."""
    names = [*(SETTINGS_FILES if adapter.is_cross_encoder else ()), *_TOKENIZER_FILES]
    files = [path / name for name in names if (path / name).exists()]
    return files + sorted(path.glob(_TEMPLATES))


def _tokenizer_digest(files: ModelFiles) -> str:
    """Of the tokenizer's files, and of what transformers looks at in the model's config when it
    loads them."""
    path = files.tokenizer_path
    named = [path / name for name in _TOKENIZER_FILES if (path / name).exists()]
    entries = {name: files.config.get(name) for name in _TOKENIZER_ENTRIES}
    return digest_of([_digest(named + sorted(path.glob(_TEMPLATES))), entries])


def _digest(files: list[Path]) -> str:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_digest, files))
    lines = [f"{file.name} {digest}" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
