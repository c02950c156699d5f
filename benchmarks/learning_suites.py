"""The named suites of benchmarks.learning: every run of each, as data.

budget4: what is learnt from 4 x 50,000 images, beside timm and LightlyTrain, at equal images and at equal wall time?
timm's token distillation is not among them: it needs a student with a distillation token, and a ResNet-20 has none.
budget20: the same after 20 x 50,000 images. The best peer of budget4 is beside it, with one seed, as it takes hours.
screening: what does each part of the recipe bring, and does a change learn more? One change at a time, with two seeds
that no other suite uses. A change that differed by more than a point with the first seed has no second.
data: is it better to see more images, or the same ones more often? Each run is a whole schedule of its own.
vit: does a small vision transformer learn from the same teacher?
transfer: what are the features worth on images that the teacher's task has nothing to do with? scikit-learn's digits,
which come with the package. Its faces (Olivetti, LFW) would have to be downloaded, so they are not here.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

ALL_IMAGES = 50_000
CACHED_VIEWS = 2
SEEDS = (0, 1, 2)
SCREENING_SEEDS = (21, 22)
# of the two suites with the most runs: 1.7 times as fast as fp32 on a CPU with avx512_bf16
FAST = {"precision": "bf16"}
TINY_IMAGES = 128

# the student of the suite vit: 1.2 million parameters, a grid of 8 x 8 patches at 32 px
VIT_EPOCHS = 4
VIT_STUDENT = {
    "student_source": "timm",
    "student_name": "vit_tiny_patch16_224",
    "student_kwargs": {"patch_size": 4, "img_size": 32, "embed_dim": 128, "depth": 6, "num_heads": 4},
    "student_repo": None,
}


@dataclass(frozen=True)
class Variant:
    """A change of the shipped recipe: keys of train_config_kd.yaml and model_config_kd.yaml.

    fixed_view: the teacher sees the image itself, the student a view of it.
    """

    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    fixed_view: bool = False


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    contender: a key of learning_runs.CONTENDERS; epochs: passes over the first `images` images; views: of the teacher's
    stored outputs, None where the teacher is live; eval_every: epochs between evaluations, a divisor of epochs.
    """

    label: str
    contender: str
    seed: int
    epochs: int
    images: int = ALL_IMAGES
    views: int | None = None
    variant: Variant = field(default_factory=Variant)
    eval_every: int = 1

    @property
    def name(self) -> str:
        """What files and folders of this run are called."""
        return f"{slug(self.label)}_{self.seed}"

    @property
    def images_seen(self) -> int:
        """Passes times images; training leaves out the short last batch of each pass, so it sees a few less."""
        return self.epochs * self.images


@dataclass(frozen=True)
class Suite:
    """A list of runs that belong into one table.

    baseline: label of the run that others are compared with, seed by seed; equal_time: whether the table compares at
    the seconds of the fastest too; picture: k-NN over images and seconds, k-NN over images seen by number of distinct
    images, or none; borrowed: label in this table -> suite, label and seed of a run that is kept there.
    """

    name: str
    runs: list[Run]
    baseline: str | None = None
    equal_time: bool = False
    picture: Literal["curves", "data"] | None = None
    borrowed: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The labels in the order of the table."""
        return list(dict.fromkeys(run.label for run in self.runs))

    def tiny(self) -> "Suite":
        """One run of each kind, of an epoch over a few images: does everything still run?"""
        kinds: dict[tuple, Run] = {}
        for run in self.runs:
            kinds.setdefault((run.contender, run.views, run.variant.fixed_view), run)
        runs = [replace(run, images=min(run.images, TINY_IMAGES), epochs=min(run.epochs, 1), eval_every=1)
                for run in kinds.values()]  # fmt: skip
        return replace(self, runs=runs)


def slug(label: str) -> str:
    """A label as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-")


CROPS = {"augment": {"hflip": True, "random_resized_crop": [0.4, 1.0]}}
# to try a change: one line here
SCREENING = {
    "as shipped": Variant(),
    "AdamW": Variant(train={"optimizer": "adamw"}),
    "learning rate 4e-3": Variant(train={"learning_rate": 4e-3}),
    "learning rate 1.6e-2": Variant(train={"learning_rate": 1.6e-2}),
    "batch 256": Variant(train={"batch_size": 256}),
    "no patch loss": Variant(train={"distill_loss_weights": {"cls": 1.0}}),
    "patch weight 0.5": Variant(train={"distill_loss_weights": {"cls": 1.0, "patch": 0.5}}),
    "patch weight 5": Variant(train={"distill_loss_weights": {"cls": 1.0, "patch": 5.0}}),
    "similarity beside": Variant(train={"distill_loss_weights": {"cls": 1.0, "patch": 2.0, "similarity": 0.5}}),
    "targets not standardised": Variant(train={"standardise_targets": False}),
    "PHI-S targets": Variant(train={"standardise_targets": "phi_s"}),
    "mirrored teacher": Variant(model={"teacher_mirror": True}),
    "linear projector": Variant(model={"projector": {"type": "linear"}}),
    "projector of 512": Variant(model={"projector": {"type": "mlp", "hidden_dim": 512}}),
    "averaged weights, 0.99": Variant(train={"ema_decay": 0.99}),
    "weight decay 0": Variant(train={"weight_decay": 0.0}),
}
# these differed from the recipe as shipped by more than a point with the first seed
CLEAR = (
    "AdamW", "batch 256", "patch weight 0.5", "similarity beside", "live teacher, fixed view",
    "live teacher, random crops", "live teacher, random crops, fixed view",
)  # fmt: skip
# stored outputs have two crops of an image at most, and never a fixed view
SCREENING_LIVE = {
    "live teacher": Variant(),
    "live teacher, fixed view": Variant(fixed_view=True),
    "live teacher, random crops": Variant(train=CROPS),
    "live teacher, random crops, fixed view": Variant(train=CROPS, fixed_view=True),
}
LIVE, CACHED = "ours-live", f"ours-cached-{CACHED_VIEWS}"
# label -> contender
PEERS = {
    "timm-feature": "timm-feature",
    "timm-logits": "timm-logits",
    "lightly-train": "lightly-train",
    "lightly-train-2e-3": "lightly-train-2e-3",
}
# (distinct images, passes): each doubles the passes of the one before, up to half a million images seen; 4 and 20
# passes over 50,000 images are runs of the budgets
DATA_CACHED = [(2_000, 10), (2_000, 20), (2_000, 40), (5_000, 10), (5_000, 20), (5_000, 40), (12_500, 10), (12_500, 20),
               (12_500, 40)]  # fmt: skip
DATA_LIVE = [(2_000, 40)]
DATA_BORROWED = {f"{CACHED} 50000 x {passes}": (f"budget{passes}", CACHED, 0) for passes in (4, 20)}


def ours(epochs: int, seed: int) -> list[Run]:
    """Ours with a live teacher, and with its stored outputs."""
    return [Run(LIVE, "ours", seed, epochs), Run(CACHED, "ours", seed, epochs, views=CACHED_VIEWS)]


def data_runs() -> list[Run]:
    """The runs of the suite data, evaluated at their ends."""
    both = [(LIVE, None, DATA_LIVE), (CACHED, CACHED_VIEWS, DATA_CACHED)]
    found = [
        Run(f"{label} {images} x {passes}", "ours", 0, passes, images, views, Variant(train=FAST), eval_every=passes)
        for label, views, pairs in both
        for images, passes in pairs
    ]
    return sorted(found, key=lambda run: (run.images, run.epochs, run.views is None))


def screening_runs() -> list[Run]:
    """The runs of the suite screening, seed by seed, evaluated at their ends."""
    changes = [(CACHED_VIEWS, SCREENING), (None, SCREENING_LIVE)]
    return [
        Run(label, "ours", seed, 4, 25_000, views, replace(variant, train=FAST | variant.train), eval_every=4)
        for seed in SCREENING_SEEDS
        for views, variants in changes
        for label, variant in variants.items()
        if seed == SCREENING_SEEDS[0] or label not in CLEAR
    ]


SUITES = {
    suite.name: suite
    for suite in (
        # contenders take turns, seed by seed: an interrupted suite has all of them
        Suite(
            "budget4",
            [
                run
                for seed in SEEDS
                for run in (*ours(4, seed), *(Run(label, peer, seed, 4) for label, peer in PEERS.items()))
            ],
            equal_time=True,
            picture="curves",
        ),
        Suite(
            "budget20",
            [
                # live and stored differ less than seeds do after 4 passes, and a live run takes hours
                *(run for seed in SEEDS for run in ours(20, seed) if run.views is not None or seed == SEEDS[0]),
                Run("timm-feature", PEERS["timm-feature"], 0, 20),
            ],
            equal_time=True,
            picture="curves",
        ),
        Suite("screening", screening_runs(), baseline="as shipped"),
        Suite("data", data_runs(), picture="data", borrowed=DATA_BORROWED),
        Suite("vit", [Run("ViT, live", "ours", 0, VIT_EPOCHS, variant=Variant(model=VIT_STUDENT))]),
        Suite("transfer", [Run("student on digits", "transfer", seed, 0, 0) for seed in SEEDS]),
    )
}
