"""The flags that choose networks and images, and the sizes that their defaults are. Imports no PyTorch."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from s3net_common.command_line import THREADS, flag
from s3net_common.images import IMAGE_SUFFIXES, MAX_PIXELS

DEVICES = "{cpu,cuda,cuda:N,mps}"
SIZE = 36  # height and width of a scene of digit_scenes.py, in pixels
DIGITS = 1797  # in scikit-learn's data
TRAINING = 1438  # the first digits are for training, the others for testing
TEST = DIGITS - TRAINING


@dataclass
class NetworkArgs:
    """Flags that choose networks and images."""

    images: tyro.conf.Positional[flag(tuple[Path, ...], "IMAGE ...", "images that come with the script")] = ()
    """Image files, or folders of them."""
    skip_unreadable: bool = False
    """Skip image files that cannot be read, and list them, instead of stopping."""
    max_pixels: flag(int, "N", f"{MAX_PIXELS:,}") = None
    """Refuse images of more pixels, which could be decompression bombs."""
    networks: flag(tuple[str, ...], "NAME ...", "the paper's four for your images, else S3-Net") = ()
    """Networks to explain: names of s3net_networks, torchvision or timm (timm/NAME if two have the name)."""
    checkpoint: flag(tuple[str, ...], "[NAME=]FILE ...", "published weights") = ()
    """Weights: the trainer's files (.safetensors, .pt), the authors' published files, or a state dict. NAME= says
    which network a file is for, if it does not say so itself. Several files of one network are several columns."""
    model_options: flag(str, "JSON", "the checkpoint's") = None
    """Options of the networks, for checkpoints without metadata: '{"growth_rate": 24, "depth": 40}'."""
    num_classes: flag(int, "INT", "the checkpoint's, else the network's usual number") = None
    """Outputs of the networks, for checkpoints without metadata."""
    random_weights: bool = False
    """Keep the initial weights (seed 0) instead of loading any, to try the method."""
    target: flag(str, "CLASS", "the predicted class") = None
    """Class to explain in every image: its name or, if no class has this name, its index."""
    image_size: flag(int, "INT", "the network's own") = None
    """Height and width in pixels of the network's input."""
    squash: bool = False
    """Resize the whole image to a square, as for the paper's figures, instead of cropping its centre."""
    batch_size: int = 8
    """Images in one pass."""
    device: flag(str, DEVICES, "a GPU if there is one") = None
    """Device to compute on."""
    faithfulness: bool = False
    """Also measure insertion and deletion; writes faithfulness.png and faithfulness.json."""
    threads: THREADS = None


def is_image(word: str) -> bool:
    """Return whether a word after the values of --networks or --checkpoint is an image, or a folder of images."""
    path = Path(word)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if not path.is_dir():
        return False
    from explained_networks import local_networks  # imports PyTorch

    return word not in local_networks()
