"""Language-model scores of texts: bits per byte of documents of any length, and how sure they are.

Shapes: B windows, T positions, V vocabulary, N documents, R resamples.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.data import corpus
from nacre.errors import ConfigError, DataError, Problem
from nacre.evaluate.scores import RESAMPLES, bounded_exp, damaged, ratio_interval
from nacre.models import stock
from nacre.models.mixing import log_likelihood

LONGEST = 2048
"""Tokens of a window, at most, unless it is asked for: its logits are all in memory."""


@dataclass(frozen=True)
class EvalDocument:
    """One text, the domain it is counted under, and the file and place it came from."""

    text: str
    domain: str
    source: str

    @property
    def language(self) -> str:
        """The first part of the domain: `en` of `en/novels`."""
        return self.domain.partition("/")[0]


def read_documents(folder: str | Path) -> list[EvalDocument]:
    """Read a folder of texts in all formats that `nacre.data` reads, sorted by domain and file.

    A document's domain is its file's folder inside `folder` (`en/novels`); of a file directly in it
    the name without extensions. Hidden files are left out. Raises DataError for a missing folder,
    one without text, and as `corpus.read` does for text that cannot be read.
    """
    root = Path(folder).absolute()
    if not root.is_dir():
        what = "is no folder" if root.exists() else "there is no such folder"
        fix = "name one that holds a folder, or a file, of text for each domain"
        raise DataError(f"{folder}: {what}; {fix}")
    files = [
        (_domain(Path(file.name).relative_to(root)), file)
        for file in corpus.check([str(root)]).files
    ]
    return [
        EvalDocument(document.text, domain, document.source)
        for domain, file in sorted(
            files, key=lambda found: (found[0], Path(found[1].name).as_posix())
        )
        for document in corpus.read_file(file)
    ]


def _domain(path: Path) -> str:
    if len(path.parts) > 1:
        return path.parent.as_posix()
    compressed = path.suffix.lower() in corpus.COMPRESSIONS
    return Path(path.stem).stem if compressed else path.stem


def fingerprint(documents: Sequence[EvalDocument]) -> str:
    """Return the SHA-256 (hex) of the documents' domains and texts, in order."""
    total = hashlib.sha256()
    for document in documents:
        for part in (document.domain, document.text):
            total.update(hashlib.sha256(part.encode()).digest())
    return total.hexdigest()


def groups(documents: Sequence[EvalDocument]) -> Iterator[tuple[str, str, list[int]]]:
    """Yield kind, name and places of the documents that are counted together.

    Every domain, before every language of several domains, before all texts.
    """
    domains: dict[str, list[int]] = {}
    languages: dict[str, set[str]] = {}
    for index, document in enumerate(documents):
        domains.setdefault(document.domain, []).append(index)
        languages.setdefault(document.language, set()).add(document.domain)
    for language, members in sorted(languages.items()):
        for domain in sorted(members):
            yield "domain", domain, domains[domain]
        if len(members) > 1:
            chosen = sorted(index for domain in members for index in domains[domain])
            yield "language", language, chosen
    yield "all", "all texts", list(range(len(documents)))


@dataclass(frozen=True)
class DocumentScore:
    """How badly a model foretold a document: -log p of its `tokens` in nats, its UTF-8 `bytes`."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The document's own; nan for an empty one."""
        return bits_per_byte([self])


def bits_per_byte(scores: Iterable[DocumentScore]) -> float:
    """Return the bits per byte of documents taken together; nan if they have no bytes."""
    scores = list(scores)
    size = sum(score.bytes for score in scores)
    return math.fsum(score.nats for score in scores) / math.log(2) / size if size else math.nan


def perplexity(scores: Iterable[DocumentScore]) -> float:
    """Return the perplexity a token of documents taken together; nan if they have no tokens."""
    scores = list(scores)
    tokens = sum(score.tokens for score in scores)
    return bounded_exp(math.fsum(score.nats for score in scores) / tokens) if tokens else math.nan


def check_finite(
    what: str, documents: Sequence[EvalDocument], scores: Sequence[DocumentScore]
) -> None:
    """Raise CheckpointError if a score is no finite number; `what` names the model."""
    for document, found in zip(documents, scores, strict=True):
        if not math.isfinite(found.nats):
            whose = f"{document.source} ({found.nats} nats)"
            raise damaged(f"{what} gives no finite likelihood for {whose}")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, without special tokens; special tokens' names in them stay text."""
    rust = tokenizers.encoder(tokenizer)
    return [found.ids for found in rust.encode_batch_fast(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class _Window:
    """A piece of a document: predicts its tokens `begin` to `end`; the last `new` count."""

    document: int
    begin: int
    end: int
    new: int

    @property
    def length(self) -> int:
        return self.end - self.begin


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> list[DocumentScore]:
    """Score every text as a document of its own, on the model's device.

    A document begins after the end-of-document token, so all of its tokens are predicted, each
    once. Windows are `context` tokens long (default: the model's) and advance by `stride` (default:
    half of that); what the window before has predicted does not count again. About `batch_tokens`
    tokens are read at once, which changes no score. `progress` receives the number of tokens scored
    since its last call. The model is left in evaluation mode. Raises ConfigError for a context or
    stride the model cannot have and a tokenizer without a token to separate documents.
    """
    context, stride = reach(model.config, context, stride)
    end_id = tokenizers.end_of_document(tokenizer)
    encoded = [torch.tensor([end_id, *ids]) for ids in encode(tokenizer, texts)]
    model.eval()
    may_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    nats = [0.0] * len(texts)
    windows = _windows([len(ids) - 1 for ids in encoded], context, stride)
    for batch in _batches(windows, batch_tokens):
        rows = [encoded[window.document][window.begin : window.end + 1] for window in batch]
        ids_BT = pad_sequence(rows, batch_first=True, padding_value=end_id).to(model.device)
        targets_BT = ids_BT[:, 1:]
        places_T = torch.arange(targets_BT.shape[1], device=model.device)
        end_B1 = torch.tensor([[window.length] for window in batch], device=model.device)
        new_B1 = torch.tensor([[window.new] for window in batch], device=model.device)
        mask_BT = places_T < end_B1
        counts_BT = mask_BT & (places_T >= end_B1 - new_B1)
        keep = batch[0].length - min(window.length - window.new for window in batch)
        logits_BTV = model(
            input_ids=ids_BT[:, :-1],
            attention_mask=mask_BT.long(),
            use_cache=False,
            **({"logits_to_keep": keep} if may_keep else {}),
        ).logits[:, -keep:]
        likelihood_BT = log_likelihood(logits_BTV, targets_BT[:, -keep:])
        counted_BT = likelihood_BT.masked_fill(~counts_BT[:, -keep:], 0.0)
        for window, total in zip(batch, counted_BT.cpu().double().sum(1).tolist(), strict=True):
            nats[window.document] -= total
        if progress:
            progress(sum(window.new for window in batch))
    return [
        DocumentScore(total, len(ids) - 1, len(text.encode()))
        for total, ids, text in zip(nats, encoded, texts, strict=True)
    ]


def reach(config: PreTrainedConfig, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return context and stride with their defaults; raise ConfigError for impossible ones."""
    most = stock.positions(config)
    context = most if context is None else context
    if context is None:
        message = "the model's configuration does not say it"
        raise ConfigError(Problem("context", message, "give the number of tokens it can read"))
    if not 1 <= context <= (most or context):
        message = f"{context} is not 1 {f'to {most:,}' if most else 'or more'}"
        raise ConfigError(Problem("context", message, "leave it out for the model's own"))
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        message = f"{stride} is not 1 to {context:,}, the context"
        raise ConfigError(Problem("stride", message, "half the context is usual"))
    return context, stride


def _windows(lengths: Iterable[int], context: int, stride: int) -> Iterator[_Window]:
    """Yield the windows of documents of so many tokens."""
    for document, length in enumerate(lengths):
        begin = scored = 0
        while scored < length:
            end = min(begin + context, length)
            yield _Window(document, begin, end, end - scored)
            begin, scored = begin + stride, end


def _batches(windows: Iterable[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    """Yield windows of about the same length together, the longest first."""
    ordered = sorted(windows, key=lambda window: (window.length, window.new), reverse=True)
    begin = 0
    while begin < len(ordered):
        end = begin + max(1, batch_tokens // ordered[begin].length)
        yield ordered[begin:end]
        begin = end


def interval(
    scores: Sequence[DocumentScore],
    others: Sequence[DocumentScore] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the 95% interval of the bits per byte of `scores`, or of how many more than `others`.

    Both are of the same documents. A percentile bootstrap (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13) over documents, drawn for both models at once as in
    Koehn 2004 ("Statistical significance tests for machine translation evaluation"). None for fewer
    than two documents. Raises ValueError for scores of different documents.
    """
    sizes_N = np.array([score.bytes for score in scores])
    more_N = np.array([score.nats for score in scores])
    if others is not None:
        if sizes_N.tolist() != [other.bytes for other in others]:
            raise ValueError("scores of different documents cannot be compared")
        more_N = more_N - np.array([other.nats for other in others])
    found = ratio_interval(more_N, sizes_N, resamples, seed)
    return None if found is None else (found[0] / math.log(2), found[1] / math.log(2))


def perplexity_interval(
    scores: Sequence[DocumentScore], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% interval of the perplexity a token, as `interval` does for bits per byte."""
    nats_N = np.array([score.nats for score in scores])
    tokens_N = np.array([score.tokens for score in scores])
    found = ratio_interval(nats_N, tokens_N, resamples, seed)
    return None if found is None else (bounded_exp(found[0]), bounded_exp(found[1]))
