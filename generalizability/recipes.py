"""Training settings of each data set and network, from the paper if it has them, and the configuration of a run."""

from dataclasses import dataclass, replace

from s3net_common.normalisation import CIFAR100_MEAN, CIFAR100_STD, IMAGENET_MEAN, IMAGENET_STD

# The choices of flags, here so that --help needs no PyTorch. A test compares them with the code that has them.
DEFAULT_DATASET = "cifar100"
SCHEDULES = ("step", "onecycle", "cosine")
CONNECTIONS = ("sparse", "chain", "dense", "residual")
NETWORK_FLAGS = ("growth_rate", "depth", "drop_rate", "connections")  # they set a network's options of the same names
DECODERS = ("cpu", "draft", "gpu")
NAMED_RECIPES = {"paper": ("cifar100", "tinyimagenet", "imagenet"), "fast": ("cifar100",)}  # with their data sets


@dataclass(frozen=True)
class Recipe:
    """Training settings of one data set. The trainer's flags replace them.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step, over all distributed ranks together.
        lr: learning rate of SGD: the peak for `onecycle`, the initial one for `step` and `cosine`.
        momentum: SGD's momentum.
        weight_decay: L2 penalty on every parameter.
        schedule: learning-rate schedule, stepped every batch: "step" (divide by 10 at each milestone), "onecycle" or
            "cosine".
        milestones: for "step", as fractions of the run.
        flip: whether training images are flipped horizontally at random.
        crop_padding: zero padding before a random crop of the original size, as a fraction of that size. Images on
            disk are cropped by RandomResizedCrop instead: 8% to 100% of the area, aspect ratio 3/4 to 4/3.
        mean, std: normalisation of each colour channel, for pixels in [0, 1].
        model: the network trained by default.
        image_size: height and width in pixels of the images that the network reads.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: bool
    crop_padding: float
    milestones: tuple[float, ...] = (0.25, 0.5, 0.75)
    model: str = "s3net_cifar"
    image_size: int = 32


RECIPES = {
    # scikit-learn's 8x8 digits, enlarged to 32x32. No flip, since a mirrored digit is no digit. Not in the paper.
    "digits": Recipe(
        epochs=16,
        batch_size=64,
        lr=0.2,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="onecycle",
        mean=(0.305, 0.305, 0.305),
        std=(0.324, 0.324, 0.324),
        flip=False,
        crop_padding=0.125,
    ),
    # CIFAR-100 as in the paper: the learning rate is divided by 10 after epochs 50, 100 and 150.
    "cifar100": Recipe(
        epochs=200,
        batch_size=64,
        lr=0.2,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        mean=CIFAR100_MEAN,
        std=CIFAR100_STD,
        flip=True,
        crop_padding=0.125,
    ),
    # Images in class folders: settings for small data sets. Not in the paper.
    "folder": Recipe(
        epochs=30,
        batch_size=64,
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="onecycle",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=True,
        crop_padding=0.125,
    ),
    # Tiny ImageNet as in the paper: 64x64 images resized to 224; the learning rate is divided by 10 every 30 epochs.
    "tinyimagenet": Recipe(
        epochs=90,
        batch_size=64,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
        schedule="step",
        milestones=(1 / 3, 2 / 3),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=True,
        crop_padding=0.0,
        model="s3net_tiny_k108",
        image_size=224,
    ),
    # ImageNet as in the paper: the learning rate is divided by 10 every 30 epochs.
    "imagenet": Recipe(
        epochs=180,
        batch_size=156,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="step",
        milestones=tuple(epoch / 180 for epoch in (30, 60, 90, 120, 150)),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=True,
        crop_padding=0.0,
        model="s3net_imagenet_small",
        image_size=224,
    ),
}

# Networks that the paper trains on Tiny ImageNet with other settings: batch 96 except for S3-Net and Scale-Net.
TINY_IMAGENET_NETWORKS = {
    **{
        name: {"batch_size": 96}
        for name in ("mobilenet_v2", "efficientnet_b0", "octresnet50", "lambda_resnet50", "ghostnet")
    },
    "se_resnet50": {"batch_size": 96, "lr": 0.05},  # the paper's; its published code has 0.005
    "scalenet50": {"lr": 0.01},
    "randwire_ws": {"batch_size": 96, "lr": 0.01},
}


def recipe_for(dataset: str, model: str | None = None) -> Recipe:
    """Return the recipe of a data set for a network, by default the network that the recipe names.

    Raises:
        KeyError: the data set is unknown.
    """
    recipe = RECIPES[dataset]
    model = model or recipe.model
    changes = TINY_IMAGENET_NETWORKS.get(model, {}) if dataset == "tinyimagenet" else {}
    return replace(recipe, model=model, **changes)


# `--recipe fast`: found with S3-Net k=12, depth 40, on CIFAR-100 by fast_recipes.py. Not in the paper.
FAST = {"epochs": 15, "batch_size": 128, "lr": 0.4, "schedule": "onecycle"}


def fast_settings(epochs: int, image_size: int) -> dict[str, int | float | bool | None]:
    """Return what `--recipe fast` adds to the plain one-cycle schedule of `FAST`: settings of `RunConfig` by name.

    Args:
        epochs: of the run. The first half of them, rounded down, train on smaller images. A run of one epoch has no
            such half. The weights of the last fifth of the epochs are averaged.
        image_size: height and width in pixels of the images of the other epochs.
    """
    return {
        "weight_decay": 5e-4,
        "norm_decay": False,
        "label_smoothing": 0.1,
        "nesterov": True,
        "average_epochs": max(1, epochs // 5),
        "early_size": max(4, image_size * 3 // 4) if epochs > 1 else None,  # --early-size begins at 4
        "early_epochs": epochs // 2,
    }


@dataclass
class RunConfig:
    """Everything that determines what a run computes. It is saved as `config.json` and cannot change on resuming.

    Attributes are those of `recipes.Recipe` and the command line's flags of the same names, with every default
    filled in. `train_images`, `val_images` and `classes` describe the data that the run was started on. `init` is the
    absolute path of the file of weights that the run started from, or "pretrained".
    """

    dataset: str
    model: str
    model_options: dict
    num_classes: int
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    milestones: list[float]
    mean: list[float]
    std: list[float]
    flip: bool
    crop_padding: float
    image_size: int
    seed: int
    amp: bool
    limit_train: int | None
    limit_val: int | None
    train_images: int
    val_images: int
    classes: list[str]
    hold_out: int | float | None = None
    accumulate: int = 1
    init: str | None = None
    sync_bn: bool = False
    decode: str = "cpu"
    augment: bool = True
    norm_decay: bool = True
    nesterov: bool = False
    label_smoothing: float = 0.0
    average_epochs: int = 0
    early_size: int | None = None
    early_epochs: int = 0
