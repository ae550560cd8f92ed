"""Train and score the example adapters: one base model, three PEFT folders, bare questions as prompts.

Each adapter is scored as PEFT reads it back from its folder. This script must not know Motet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("MOTET_DATA", HERE.parents[2] / "shared" / "data"))
BATCH = 16
WARMUP_STEPS = 20
IGNORED = -100  # cross_entropy skips this label
SELECT = re.compile(r"SELECT (?:([A-Z]+) )?(\S+?)_FIELD FROM TABLE(?: AS \w+)?(?: WHERE (.+))? ;", re.I)
CONDITION = re.compile(r"(\S+?)_FIELD ([=<>]) (.+)")
SQL = re.compile(r"select (.+?) from \S+(?: where (.+))?")

Example = tuple[str, str]  # question, answer
Answers = tuple[list[str], list[float]]  # texts, logit margins
Facts = frozenset[tuple[str, str]]  # what a text says, free of its order, case and quotes


class Recipe(NamedTuple):
    steps: int
    learning_rate: float
    test_rows: int
    answer_tokens: int


@dataclass(frozen=True)
class Task:
    data: str
    read: Callable[[dict[str, Any]], Example | None]  # a row of the data; None where it does not fit
    facts: Callable[[str], Facts | None]  # what an answer is scored by; None where it is not of the task's form
    hint: str  # put before the question for the base model only, which cannot know the form otherwise
    adapter: dict[str, Any]
    recipe: Recipe
    demo: str
    choices: tuple[str, str] | None = None  # answers to rank by the logit of their first token as well


def untokenised(text: str) -> str:
    return re.sub(r" (?=[?.,!)]|'s\b|n't\b|-level)", "", text)  # people put no space before punctuation


def read_wikisql(row: dict[str, Any]) -> Example | None:
    """Columns as identifiers, text quoted and spelt as in the question, numbers plain."""
    question = untokenised(row["question"])
    if (parsed := SELECT.fullmatch(row["sql"].replace("TABLEalias0.", ""))) is None:
        return None
    function, selected, where = parsed.groups()
    names, terms = [selected], []
    for part in re.split(r" AND (?=\S+_FIELD [=<>] )", where) if where else []:
        condition = CONDITION.fullmatch(part)
        value = condition and re.search(re.escape(untokenised(condition[3].strip('" '))), question, re.I)
        if not condition or not value or not value[0]:
            return None
        number = re.fullmatch(r"-?\d+(\.\d+)?", value[0].replace(",", ""))
        names.append(condition[1])
        terms.append(f" {condition[2]} " + (number[0] if number else "'" + value[0].replace("'", "''") + "'"))
    columns = [re.sub(r"[\W_]+", "_", name).strip("_").lower() for name in names]
    answer = f"SELECT {function.upper()}({columns[0]})" if function else f"SELECT {columns[0]}"
    wanted = " AND ".join(column + term for column, term in zip(columns[1:], terms, strict=True))
    answer += " FROM table" + (f" WHERE {wanted}" if wanted else "")
    return (question, answer) if all(columns) else None


def sql_facts(text: str) -> Facts | None:
    line = " ".join(re.sub(r"[\"'`]|```(sql)?", "", text.split(";")[0]).casefold().split())
    if (parsed := SQL.fullmatch(line[max(line.find("select "), 0) :])) is None:
        return None
    conditions = re.sub(r" ?([=<>]) ?", r" \1 ", parsed[2]).split(" and ") if parsed[2] else []
    return frozenset({("select", parsed[1]), *(("where", condition) for condition in conditions)})


def read_slots(row: dict[str, Any]) -> Example:
    """Slots in the order of the question; `number0`, `number1` become one list; unfilled slots are left out."""
    question = untokenised(row["question"])
    filled = [(untokenised(value), re.sub(r"\d+$", "", name)) for name, value in row["slots"].items() if value]
    slots: dict[str, list[str]] = {}
    for value, name in sorted(filled, key=lambda slot: question.lower().find(slot[0].lower())):
        slots.setdefault(name, []).append(value)
    return question, json.dumps({name: v[0] if len(v) == 1 else v for name, v in slots.items()})


def slot_facts(text: str) -> Facts | None:
    found = re.search(r"\{.*?\}", text, re.S)
    try:
        slots = json.loads(found[0] if found else "")
    except json.JSONDecodeError:
        return None
    listed = [(name, value if isinstance(value, list) else [value]) for name, value in slots.items()]
    return frozenset((name.casefold(), str(item).casefold()) for name, items in listed for item in items)


def read_boolq(row: dict[str, Any]) -> Example:
    question = row["instruction"].split("question: ", 1)[1].split("\n", 1)[0]
    return question[0].upper() + question[1:], row["answer"]


def boolq_facts(text: str) -> Facts | None:
    said = re.match(r"\W*(true|yes|false|no)\b", text.casefold())
    return said and frozenset({("answer", {"yes": "true", "no": "false"}.get(said[1], said[1]))})


QKVO = ["k_proj", "o_proj", "q_proj", "v_proj"]
TASKS = {
    "wikisql": Task(
        data="text/wikisql",
        read=read_wikisql,
        facts=sql_facts,
        hint="Write one SQL query over a table named table that answers the question. Reply with SQL only, "
        "like SELECT MAX(points) FROM table WHERE team = 'Essendon' AND year > 1990\n\nQuestion: ",
        adapter={"r": 4, "lora_alpha": 8, "target_modules": ["down_proj", "gate_proj", "up_proj", *QKVO]},
        recipe=Recipe(steps=240, learning_rate=2e-3, test_rows=160, answer_tokens=80),
        demo="What is the highest number of points when the home team is Essendon?",
    ),
    "advising-slots": Task(
        data="text/advising_sql",
        read=read_slots,
        facts=slot_facts,
        hint="Extract the values of department, number, requirement, semester, instructor, topic, credit, level, "
        "year, time, area, grade and program that the question names. Reply with one JSON object only, like "
        '{"department": "MATH", "number": "185", "semester": "Summer"}\n\nQuestion: ',
        adapter={"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": QKVO},
        recipe=Recipe(steps=240, learning_rate=1e-3, test_rows=200, answer_tokens=64),
        demo="Is EECS 484 offered in the Winter of 2017?",
    ),
    "boolq": Task(
        data="qa/boolq",
        read=read_boolq,
        facts=boolq_facts,
        hint="Answer with one word, true or false: ",
        adapter={"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
        recipe=Recipe(steps=240, learning_rate=1e-3, test_rows=400, answer_tokens=4),
        demo="Is confectioners' sugar the same as powdered sugar?",
        choices=("true", "false"),
    ),
}


def examples(task: Task, split: str) -> list[Example]:
    lines = (DATA / f"{task.data}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    found = [example for line in lines if (example := task.read(json.loads(line))) is not None]
    if task.choices is None:
        return found
    sides = ([example for example in found if example[1] == choice] for choice in task.choices)
    return [example for pair in zip(*sides, strict=False) for example in pair]  # as many of the one as the other


def prompt(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def batches(rows: Sequence[tuple[list[int], list[int]]], steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded `(ids, labels)`; within every 16 batches, rows of like length go together."""
    order = [row for _ in range(0, steps * BATCH, len(rows)) for row in random.sample(rows, len(rows))]
    for start in range(0, steps * BATCH, 16 * BATCH):
        pool = order[start : min(start + 16 * BATCH, steps * BATCH)]
        pool.sort(key=lambda row: len(row[0]) + len(row[1]))
        for first in random.sample(range(0, len(pool), BATCH), len(pool) // BATCH):
            chosen = pool[first : first + BATCH]
            ids = [torch.tensor(asked + told) for asked, told in chosen]
            labels = [torch.tensor([IGNORED] * len(asked) + told) for asked, told in chosen]
            yield pad_sequence(ids, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def train(model: Any, tokenizer: Any, task: Task) -> None:
    steps, rate, end = task.recipe.steps, task.recipe.learning_rate, tokenizer.eos_token
    rows = [(prompt(tokenizer, q), tokenizer(a + end)["input_ids"]) for q, a in examples(task, "train")]
    columns = zip(*(asked for asked, _ in rows), strict=False)
    prefix = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    rows = [(asked[len(prefix) :], told) for asked, told in rows]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    inner = model.get_base_model().train()  # its two halves, to leave out the logits of the prompt
    for step, (ids, labels) in enumerate(track(batches(rows, steps), "training", steps)):
        warm = min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * warm
        wanted = labels[:, 1:] != IGNORED
        with torch.autocast("cpu", torch.bfloat16):
            # The system message goes through once for the batch, its gradients too. No mask: attention is
            # causal and the padding is to the right, so no token sees a pad.
            past = inner.model(input_ids=torch.tensor([prefix]), use_cache=True).past_key_values
            past.batch_repeat_interleave(len(ids))
            hidden = inner.model(input_ids=ids, past_key_values=past, use_cache=True).last_hidden_state
            logits = inner.lm_head(hidden[:, :-1][wanted])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def save(model: Any, folder: Path) -> None:
    """Write PEFT's two files only, tensors as bfloat16, without a trace of where the base model lay."""
    model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": BASE, "target_modules": sorted(config["target_modules"])}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, task: Task, questions: Sequence[str], limit: int) -> Answers:
    """Greedy answers and, with choices, the first token's logit for the one less that for the other."""
    texts, margins = [""] * len(questions), [0.0] * len(questions)
    prompts = [prompt(tokenizer, question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    keep = {"return_dict_in_generate": True, "output_logits": task.choices is not None}
    for start in track(range(0, len(order), 2 * BATCH), description="answering"):
        chosen = order[start : start + 2 * BATCH]
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt")
        out = model.eval().generate(**batch, **keep, do_sample=False, max_new_tokens=limit)
        for row, i in enumerate(chosen):
            texts[i] = tokenizer.decode(out.sequences[row, len(batch["input_ids"][0]) :], skip_special_tokens=True)
            if task.choices:
                one, other = (tokenizer(choice)["input_ids"][0] for choice in task.choices)
                margins[i] = float(out.logits[0][row, one] - out.logits[0][row, other])
    return texts, margins


def score(model: Any, tokenizer: Any, task: Task, tests: Sequence[Example], hint: str) -> dict[str, float]:
    """Exact match and micro F1 of the facts, share of well-formed texts; with choices, accuracy and AUC of logits."""
    texts, margins = answers(model, tokenizer, task, [hint + q for q, _ in tests], task.recipe.answer_tokens)
    pairs = [(task.facts(t), task.facts(a) or frozenset()) for t, (_, a) in zip(texts, tests, strict=True)]
    metrics = {
        "exact_match": fmean(g == w for g, w in pairs),
        "f1": 2 * sum(len(g & w) for g, w in pairs if g) / sum(len(g or ()) + len(w) for g, w in pairs),
        "well_formed": fmean(g is not None for g, _ in pairs),
    }
    if task.choices:
        yes, no = ([m for m, (_, a) in zip(margins, tests, strict=True) if a == c] for c in task.choices)
        metrics["majority_class"] = max(len(yes), len(no)) / len(tests)
        metrics["logit_accuracy"] = fmean([y > 0 for y in yes] + [n <= 0 for n in no])
        metrics["logit_auc"] = fmean((y > n) + (y == n) / 2 for y in yes for n in no)
    return {name: round(value, 4) for name, value in metrics.items()}


def run(name: str, task: Task, base_folder: Path, seed: int) -> None:
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tests = examples(task, "test")
    chosen = random.sample(tests, min(task.recipe.test_rows, len(tests)))
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **task.adapter))
    start = time.monotonic()
    train(model, tokenizer, task)
    seconds = round(time.monotonic() - start)
    save(model, HERE / name)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    scores: dict[str, Any] = {"task": name, "split": f"{task.data}.test", "n": len(chosen), "of": len(tests)}
    scores["base_told_the_format"] = score(base, tokenizer, task, chosen, task.hint)
    said = {"question": task.demo, "base": answers(base, tokenizer, task, [task.demo], 80)[0][0]}
    adapted = PeftModel.from_pretrained(base, HERE / name)
    scores["adapter"] = score(adapted, tokenizer, task, chosen, "")
    scores["demo"] = said | {"adapter": answers(adapted, tokenizer, task, [task.demo], 80)[0][0]}
    scores |= {"steps": task.recipe.steps, "batch": BATCH, "learning_rate": task.recipe.learning_rate, "seed": seed}
    scores |= {"training_seconds": seconds, "training_dtype": "bfloat16 autocast", "scoring_dtype": "float32"}
    scores |= {package: version(package) for package in ("torch", "transformers", "peft")}
    (HERE / name / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", choices=[[], *TASKS], help="all, or: " + ", ".join(TASKS))
    parser.add_argument("--model", type=Path, required=True, help=f"folder of {BASE}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.tasks or TASKS:
        run(name, TASKS[name], options.model, options.seed)


if __name__ == "__main__":
    main()
