"""STARTS: one function for each row of RECIPES, which turns a base model into a trainee.

Must not know: data, loops, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from motet.adapters.heads import Parameterization
from motet.adapters.recipes import amt, corda, emtal, eva, headed, ilora, lisa, plain, polar, s2ft
from motet.adapters.recipes.trainee import Setup, Trainee

STARTS: Mapping[str, Callable[[Setup], Trainee]] = {
    "lora": plain.start,
    "rslora": plain.start,
    "dora": plain.start,
    "eva": eva.start,
    "pissa": plain.start,
    "olora": plain.start,
    "corda-ipm": corda.ipm,
    "corda-kpm": corda.kpm,
    "polar": polar.start,
    "s2ft": s2ft.start,
    "emtal": emtal.start,
    "llara": partial(ilora.start, experts=1),
    "ilora": ilora.start,
    "lora-head": partial(headed.start, body=plain.start, parameterization=Parameterization.SOFTMAX),
    "polar-vbll": partial(headed.start, body=polar.start, parameterization=Parameterization.DENSE),
    "polar-vbll-diagonal": partial(headed.start, body=polar.start, parameterization=Parameterization.DIAGONAL),
    "polar-vbll-lowrank": partial(headed.start, body=polar.start, parameterization=Parameterization.LOW_RANK),
    "polar-laplace": partial(headed.start, body=polar.start, parameterization=Parameterization.DENSE, laplace=True),
    "amt": amt.start,
    "lisa": lisa.lisa,
    "full": lisa.full,
}
