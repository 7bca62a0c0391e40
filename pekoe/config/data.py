"""The `[data]` section of recipes: what to train on, and what to leave out of it."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pekoe.config.base import ConfigSection, FileName

ReferenceCheck = Literal["error", "drop", "warn"]
Columns = dict[Literal["prompt", "answer", "uid", "kind"], str]


class DataSection(ConfigSection):
    train: FileName
    """Demonstrations to train on: a file, a directory or a data set, as problems are."""
    columns: dict[Literal["prompt", "response"], str] = Field(default_factory=dict)
    """As for problems, of the prompt and the response: { prompt = "q", response = "a" }."""
    skip_malformed: bool = False
    """Skip, and report, rows that cannot be used, in place of stopping."""


class SourceSection(ConfigSection):
    """One of the sets that a mix is made of."""

    path: FileName
    """As data.train."""
    columns: Columns = Field(default_factory=dict)
    """As data.columns, which it replaces."""
    name: str
    """Stands before its problems' uids (name/uid) and in reports."""
    weight: float = Field(default=1.0, gt=0, le=10_000)
    """How often an epoch draws each of its problems: 0.5 takes a seeded half of them; 2 takes each twice, the second
    time as uid#2."""
    limit: int | None = Field(default=None, ge=1)
    """Keep at most this many of its problems, a seeded choice; `weight` counts from there."""
    where: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """Read only rows whose column (the key) holds one of these values."""


class ProblemSection(ConfigSection):
    train: FileName | None = None
    """Problems to train on: JSON lines, a JSON array, CSV (each also as .gz, .zst, .bz2, .xz), Parquet, a directory of
    datasets' save_to_disk, or a data set of the hub, `hf:OWNER/NAME[/CONFIG][:SPLIT]`. `pekoe data FILE` shows how it
    is read."""
    columns: Columns = Field(default_factory=dict)
    """Which columns are the prompt, answer, uid and kind where others than the known names are, such as
    { prompt = "task.text", answer = "gold" }; dots lead into objects."""
    sources: tuple[SourceSection, ...] = Field(default=(), strict=False)
    """In place of `train`: several sets, mixed."""
    skip_malformed: bool = False
    """Skip, and report, rows that cannot be used, in place of stopping."""
    check: ReferenceCheck = "error"
    """What to do, before anything is sampled, where a judge cannot read a problem's reference or would not accept it as
    an answer: error stops and names the first ten; drop leaves these problems out; warn names them and keeps them (most
    of their verdicts will be FAULT). `pekoe verify --references FILE` lists all."""
    max_prompt_tokens: int = Field(default=1024, ge=1)
    """A longer prompt is an error, unless skip_malformed is on."""
    dedup: Literal["off", "exact", "near"] = "off"
    """exact: of problems with the same prompt (spaces and chat markers aside) keep the first. near: also of those with
    the same answer, the same numbers and nearly the same words (not for puzzles of one template: there a word makes
    another puzzle). off: only say how many there are."""
    dedup_threshold: float = Field(default=0.8, ge=0.5, le=1)
    """For near: the share of three-word runs that two prompts have in common (Jaccard), from which they are one."""
    conflicts: Literal["drop", "first"] = "drop"
    """Of problems with the same prompt and different answers, with dedup on: drop all (at least one answer is wrong,
    and nobody knows which), or keep the first."""
    decontaminate: tuple[FileName, ...] = Field(default=(), strict=False)
    """Evaluation sets (as in `train`); problems that share a run of `ngram` words with one of theirs are dropped."""
    ngram: int = Field(default=13, ge=4)
    """Length of such a run, in words, numbers and operators. Shorter evaluation problems must match as a whole."""
    pass_rate: tuple[float, float] | None = Field(default=None, strict=False)
    """Keep problems whose pass rate, as `pekoe curate` writes it, lies between the two."""

    @property
    def described(self) -> str:
        """The files of the problems, for error messages."""
        return self.train or ", ".join(source.path for source in self.sources)

    @model_validator(mode="after")
    def _one_origin(self) -> ProblemSection:
        if (self.train is None) == (not self.sources):
            got = "both" if self.sources else "neither"
            raise ValueError(f"data: expected either train (one set) or sources (several), got {got}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources: expected a name of its own for each, got {names}")
        if self.pass_rate and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise ValueError(f"data.pass_rate: expected [low, high] from 0 to 1, got {list(self.pass_rate)}")
        return self


def _iso_date(value: Any) -> str | None:
    """TOML writes a date with quotes or without."""
    try:
        return None if value is None else date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ValueError(f"model.template.date: expected a date such as 2026-01-31, got {value!r}") from None


def _template_variables(value: dict[str, Any]) -> dict[str, Any]:
    given = sorted(value.keys() & {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"})
    if given:
        raise ValueError(f"model.template.variables: expected names that Pekoe does not set itself, got {given}")
    try:
        json.dumps(value)
    except TypeError:
        raise ValueError("model.template.variables: expected what JSON can write, got a date or a time") from None
    return value


class TemplateSection(ConfigSection):
    """How conversations become prompts, wherever the model is used. Raw prompts (AReaL's) are left as they are."""

    name: Literal["model", "r1", "qwen"] = "model"
    """The model directory's own chat template, DeepSeek-R1-Distill's, or Qwen2.5's."""
    directive: str = ""
    """Put behind the last question; the release's: "\\nPlease reason step by step, and put your final answer within
    \\boxed{}." """
    think: bool = False
    """Prompts end with <think> and a newline, which the response then begins after."""
    date: Annotated[str | None, BeforeValidator(_iso_date)] = None
    """The date that the template prints, where it prints one (Llama 3's does). Absent: that of the day on which the run
    began, kept in its config.toml."""
    variables: Annotated[dict[str, Any], AfterValidator(_template_variables)] = Field(default_factory=dict[str, Any])
    """Variables of the model's own template, such as { enable_thinking = false } of Qwen3's."""
