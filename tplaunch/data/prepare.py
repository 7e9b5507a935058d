"""The data of a recipe made ready before any process starts: raw text prepared once, everything checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tplaunch.data.answers import ChatReader, chat_reader
from tplaunch.data.blocks import SAMPLED
from tplaunch.data.build import tokenize, train_tokenizer
from tplaunch.data.cache import default_cache, owned, subdirectory
from tplaunch.data.corpus import refuse_other_kind, refuse_other_tokenizer, tokenizer_path, verify_corpus
from tplaunch.data.dataset import samples_in
from tplaunch.data.endings import files_of, is_raw
from tplaunch.data.fingerprint import text_sha256
from tplaunch.data.indexed import IndexedTokens, idx_path
from tplaunch.data.inputs import raw_files
from tplaunch.data.made import FORMAT, corpora, digest, recipe_name, trained_tokenizer
from tplaunch.data.progress import Progress
from tplaunch.data.remembered import Remembered, remembered
from tplaunch.data.row_index import key_of, ready_rows
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.files import write_atomic
from tplaunch.recipe.schema import Recipe, Source, TrainTokenizer
from tplaunch.spec.run_stages import longest_samples

_START_BLOCKS = 256  # that a start reads of all corpora together, one of each at least


def prepare_recipe_data(recipe: Recipe, cache: Path | None = None, progress: bool = True) -> Recipe:
    """Prepare raw text on first use and check all data of a recipe against its model.

    What is prepared lies in the cache under a hash of the text, the tokenizer and the format's version; launches
    that need the same at one time make it once.

    Args:
        recipe: with absolute paths under `data`.
        cache: default `$TPLAUNCH_CACHE` or `~/.cache/tplaunch`.
        progress: show bars, on a terminal.

    Returns:
        the recipe with absolute prefixes of .bin/.idx pairs and the path of a tokenizer.json; the tokenizer stays
        None when prepared data came without one.

    Raises:
        RecipeError: with every problem that was found: missing or damaged files, a token or a tokenizer beyond
            the vocabulary, a tokenizer that the data was not made with, less than one sample.
    """
    cache = (cache or default_cache()).absolute()
    with remembered(cache) as sums:
        return _Preparation(recipe, cache, Progress(progress), sums).run()


class _Preparation:
    """One call of `prepare_recipe_data`: the recipe, where to put things, and the problems found so far."""

    def __init__(self, recipe: Recipe, cache: Path, show: Progress, sums: Remembered) -> None:
        self.recipe, self.data, self.cache, self.show, self.sums = recipe, recipe.data, cache, show, sums
        self.problems: list[Problem] = []
        self.chat: ChatReader | None = None  # of conversations

    def run(self) -> Recipe:
        entries = [*self.recipe.keyed_corpora(), *self.data.keyed_sources("validation")]
        for key, source in entries:
            with self._problems_at(key):
                path = Path(source.path)
                raw_files([path]) if is_raw(path) else IndexedTokens.open(path)
        self._raise_problems()

        tokenizer_file = self._tokenizer_file([source for _, source in entries])
        self._raise_problems()
        tokenizer = None
        if tokenizer_file:
            with self._problems_at("data.tokenizer"):
                tokenizer = Tokenizer(tokenizer_file, self.data.eod)
                self._check_vocabulary(tokenizer)
        if tokenizer_file and tokenizer and self.data.kind == "chat":
            given = self.recipe.finetune.chat_template
            with self._problems_at("finetune.chat_template"):
                template = Path(given) if given else None
                self.chat = chat_reader(tokenizer_file, tokenizer, template, self.recipe.finetune.loss_on)
        self._raise_problems()

        prefixes, lengths = {}, longest_samples(self.recipe)
        sample = max(1, min(SAMPLED, _START_BLOCKS // len(entries)))
        for key, source in entries:
            with self._problems_at(key):
                path = Path(source.path).absolute()
                seq_len = lengths.get(source.path, self.recipe.training.seq_len)
                prefixes[key] = self._ready(path, tokenizer, sample, seq_len)
                if tokenizer_file and is_raw(path):
                    wanted = recipe_name(self._sums(files_of(path)), tokenizer_file, self.recipe, self.sums)
                    self.sums.note(wanted, prefixes[key].name)
        self._raise_problems()

        moved = self.recipe.moved({source.path: str(prefixes[key]) for key, source in entries})
        tokenizer_name = str(tokenizer_file) if tokenizer_file else None
        return moved.model_copy(update={"data": moved.data.model_copy(update={"tokenizer": tokenizer_name})})

    def _tokenizer_file(self, sources: list[Source]) -> Path | None:
        """The tokenizer that the recipe names, trains, or whose data was made with it."""
        wanted = self.data.tokenizer
        raw = [Path(source.path) for source in sources if is_raw(Path(source.path))]
        if isinstance(wanted, str):
            return Path(wanted).absolute()
        if isinstance(wanted, TrainTokenizer):
            return self._trained(wanted)
        if raw:
            self.problems.append(
                Problem(
                    "is needed to read raw text",
                    why=f"{raw[0].name} is not tokenized yet",
                    fix=f"name a tokenizer.json, or train one with {{vocab_size: {self.recipe.model.vocab_size}}}",
                    key="data.tokenizer",
                )
            )
            return None
        beside = [tokenizer_path(Path(source.path).absolute()) for source in sources]
        return next((path for path in beside if path.exists()), None)

    def _trained(self, wanted: TrainTokenizer) -> Path | None:
        """A tokenizer trained on the raw training text, from the cache where it was trained before."""
        given = [path for source in self.recipe.corpora if is_raw(path := Path(source.path).absolute())]
        inputs = raw_files(given)
        if not inputs:
            self.problems.append(
                Problem(
                    "no raw training text to train a tokenizer on",
                    why="data.train is tokenized already",
                    fix="name the tokenizer.json that it was made with",
                    key="data.tokenizer",
                )
            )
            return None
        path = trained_tokenizer(self.cache, wanted.vocab_size, self.data.text_key, self._sums(inputs))
        subdirectory(self.cache, path.parent.name)
        with self._problems_at("data.train"), self._once(path, path) as missing:
            if missing:
                train_tokenizer(inputs, wanted.vocab_size, self.data.text_key, path, self.show)
        return path

    def _check_vocabulary(self, tokenizer: Tokenizer) -> None:
        rows = self.recipe.model.vocab_size
        if tokenizer.vocab_size > rows:
            raise TplaunchError(
                Problem(
                    f"is {rows:,}, but the tokenizer has {tokenizer.vocab_size:,} tokens",
                    fix=f"set model.vocab_size: {tokenizer.vocab_size}",
                    key="model.vocab_size",
                )
            )

    def _ready(self, path: Path, tokenizer: Tokenizer | None, sample: int, seq_len: int) -> Path:
        """The checked prefix of a source that has a sample of `seq_len`, prepared first where it is raw."""
        prefix = path
        if is_raw(path):
            assert tokenizer is not None, "raw text without a tokenizer was refused before"
            prefix = self._prepared(path, tokenizer)
        refuse_other_kind(prefix, self.data.kind)
        if tokenizer:
            refuse_other_tokenizer(prefix, tokenizer)
        verified = verify_corpus(prefix, self.show, vocab_size=self.recipe.model.vocab_size, sample=sample)
        if self.data.packs:
            key = key_of(prefix, self.data.kind, seq_len, self.sums)
            ready_rows(verified.corpus, self.data.kind, seq_len, self.cache, key, self.show)
        else:
            samples_in(verified.corpus, seq_len)
        return prefix

    def _prepared(self, path: Path, tokenizer: Tokenizer) -> Path:
        """The prefix, in the cache, of a raw source: all files of a folder or pattern are one corpus."""
        files = raw_files([path], self.show)
        sums = self._sums(files)
        content = sums[0] if len(sums) == 1 else sums
        how = self.chat.about() if self.chat else [self.data.text_key, *tokenizer.begin]
        name = digest([FORMAT, content, tokenizer.fingerprint, *how])
        title = re.sub(r"[*?\[\]]", "_", path.name.split(".")[0])
        prefix = subdirectory(self.cache, corpora(self.cache).name) / f"{title}-{name}"
        with self._once(prefix, idx_path(prefix)) as missing:
            if missing:
                write_atomic(tokenizer_path(prefix), tokenizer.json)
                tokenize(files, prefix, tokenizer, self.data.text_key, self.show, chat=self.chat)
        return prefix

    def _sums(self, files: Sequence[Path]) -> list[str]:
        return [self.sums.sum_of(file, text_sha256) for file in files]

    @contextmanager
    def _once(self, prefix: Path, complete: Path) -> Iterator[bool]:
        """Own what is to be made at `prefix`, unless it is there; yields whether `complete` is missing."""
        if complete.exists():
            yield False
        else:
            with owned(prefix, self.show):
                yield not complete.exists()

    @contextmanager
    def _problems_at(self, key: str) -> Iterator[None]:
        """Collect what is wrong, under a key of the recipe."""
        try:
            yield
        except TplaunchError as error:
            self.problems += [replace(problem, key=problem.key or key) for problem in error.problems]

    def _raise_problems(self) -> None:
        if self.problems:
            raise RecipeError(*self.problems)
