"""Tables of the paper (arXiv 1811.09003) that runs are compared with: the numbers as printed.

The paper's authors trained the networks of some rows. The other rows cite the errors given in other papers. In the
CIFAR-100 table (Table III) the cited errors are of unlike things: some networks were trained without augmentation,
S3-Net was trained with it. `AUGMENTED_ROWS` are errors of such networks with augmentation, which the paper lacks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One row of one of the tables.

    Attributes:
        dataset: name as in train_s3net.py.
        network, setting: names as in the paper.
        error: top-1 error in percent.
        measured: whether the paper's authors trained the network.
        parameters: as printed; None if the table prints none.
        code_parameters: parameters of the network that the published code builds; None if it builds none.
        multiply_adds: for one image, counted in this repository's network of the same setting; None if it has none.
        augmented: whether the training images were cropped and flipped at random; None if unknown.
        source: where the error was looked up, and what stands there if it differs; "" if it could not be looked
            up; None if that was not tried.
        printed: whether the paper prints the row. The others are added here, for comparison.
    """

    dataset: str
    network: str
    setting: str
    error: float
    measured: bool
    parameters: float | None = None
    code_parameters: int | None = None
    multiply_adds: int | None = None
    augmented: bool | None = True
    source: str | None = None
    printed: bool = True

    @property
    def prints_fewer(self) -> bool:
        """Whether the table prints fewer parameters than the code builds, by more than rounding explains."""
        known = self.parameters is not None and self.code_parameters is not None
        return known and self.code_parameters - self.parameters > 0.05e6


DENSENET = "README of github.com/liuzhuang13/DenseNet"
LP_BNN = "paperswithcode.com: accuracy 76.85 with cutout, an error of 23.15"
SHUFFLENET = "README of github.com/megvii-model/ShuffleNet-Series"
RANDWIRE = "README of github.com/seungwonpark/RandWireNN"
DNAL = "README of DNAL by github.com/QingbeiGuo, quoted there"
DEIT = "README_deit.md of github.com/facebookresearch/deit: 25.5 with distillation, 27.8 without"

PAPER_ROWS = [
    # CIFAR-100. The networks of the published code have 100 outputs.
    PaperRow("cifar100", "S3-Net", "k=12, depth=40", 29.80, True, 0.2e6, 272_836, 42_780_192),
    PaperRow("cifar100", "S3-Net", "k=24, depth=40", 26.46, True, 0.8e6, 927_244, 156_207_840),
    PaperRow("cifar100", "S3-Net", "k=40, depth=40", 24.16, True, 2.2e6, 2_400_556, 418_663_392),
    PaperRow("cifar100", "S3-Net", "k=64, depth=40", 23.30, True, 5.9e6, 5_897_884, 1_050_672_480),
    PaperRow("cifar100", "S3-Net", "k=64, depth=70", 22.76, True, 15.4e6, 15_372_444, 2_412_702_560),
    # Rows that the paper quotes. DenseNet's results, and others, are those without augmentation.
    PaperRow("cifar100", "NIN", "dropout", 35.68, False, augmented=None, source=""),
    PaperRow("cifar100", "FractalNet", "dropout", 35.34, False, 38.6e6, augmented=None, source=""),
    PaperRow("cifar100", "ResNet", "stochastic depth", 37.80, False, 1.7e6, augmented=False, source=""),
    PaperRow("cifar100", "DIANet", "", 23.02, False, augmented=None, source="paperswithcode.com: accuracy 76.98"),
    PaperRow("cifar100", "SpinalNet", "", 35.01, False, augmented=None, source=""),
    PaperRow("cifar100", "LP-BNN", "", 23.02, False, augmented=None, source=LP_BNN),
    PaperRow("cifar100", "ResNet-1001", "", 22.71, False, 17.8e6, augmented=None, source=""),
    PaperRow("cifar100", "DenseNet", "k=12, depth=40", 27.55, False, 1.0e6, None, 227_448_576, False, DENSENET),
    PaperRow("cifar100", "DenseNet", "k=12, depth=100", 23.79, False, 7.0e6, augmented=False, source=DENSENET),
    PaperRow("cifar100", "DenseNet", "k=24, depth=100", 23.42, False, 27.2e6, augmented=False, source=DENSENET),
    # Tiny ImageNet: one script trained all networks. The networks of the published code have 1000 outputs.
    PaperRow("tinyimagenet", "MobileNetV2", "lr 0.1", 43.76, True, None, 3_504_872, 300_774_272),
    PaperRow("tinyimagenet", "EfficientNet-B0", "lr 0.1", 42.91, True, None, 5_288_548, 385_814_752),
    PaperRow("tinyimagenet", "OctResNet-50", "lr 0.1", 47.45, True, None, 25_557_032, 2_367_143_936),
    PaperRow("tinyimagenet", "LambdaResNet-50", "lr 0.1", 58.71, True, None, 14_998_056, 6_575_505_408),
    PaperRow(
        "tinyimagenet", "SE-ResNet-50", "lr 0.05 (0.005 in its code)", 53.98, True, None, 28_071_976, 4_091_699_200
    ),
    PaperRow("tinyimagenet", "ScaleNet-50", "lr 0.01", 48.59, True, None, 31_483_618, 3_818_372_352),
    PaperRow("tinyimagenet", "GhostNet", "lr 0.1", 44.01, True, None, 5_183_016, 141_149_744),
    PaperRow("tinyimagenet", "RandWire-WS", "regular, lr 0.01", 42.11, True, None, 31_619_209, 3_904_995_340),
    PaperRow("tinyimagenet", "S3-Net", "k=96, lr 0.1", 43.02, True, 5.0e6, 5_021_608, 4_838_509_248),
    PaperRow("tinyimagenet", "S3-Net B", "k=108, lr 0.1", 41.98, True, 10.6e6, 10_600_800, 11_996_583_632),
    # ImageNet: networks with few parameters.
    PaperRow("imagenet", "S3-Net", "k=96, depth=45", 25.2, True, 9.2e6, 9_405_560, 8_026_999_808),
    # "quoted there" is a listing by others of the cited paper's error.
    PaperRow("imagenet", "DenseNet-121", "", 25.4, False, 7.98e6, source=f"{DENSENET}: 25.0"),
    PaperRow("imagenet", "MobileNetV2", "", 25.3, False, 6.9e6, source=f"{SHUFFLENET}, quoted there"),
    PaperRow("imagenet", "ShuffleNet", "", 26.3, False, 5.4e6, source=f"{SHUFFLENET}: 25.9"),
    PaperRow("imagenet", "NASNet-B", "", 27.2, False, source=DNAL),
    PaperRow("imagenet", "NASNet-C", "", 27.5, False, source=DNAL),
    PaperRow("imagenet", "Amoeba-A", "", 25.5, False, source=""),
    PaperRow("imagenet", "Amoeba-B", "", 26.0, False, source=""),
    PaperRow("imagenet", "PNAS", "", 25.8, False, source=f"{SHUFFLENET}, quoted there"),
    PaperRow("imagenet", "DARTS", "", 26.9, False, source="README of github.com/quark0/darts: 26.7"),
    PaperRow("imagenet", "FBNet-A", "", 27.0, False, source=DNAL),
    PaperRow("imagenet", "RandWire-WS", "", 25.3, False, 5.6e6, source=f"{RANDWIRE}, quoted there"),
    PaperRow("imagenet", "Proxyless-R", "", 25.4, False, source=""),
    PaperRow("imagenet", "RegNetX-600MF", "", 25.9, False, source="MODEL_ZOO.md of github.com/facebookresearch/pycls"),
    PaperRow("imagenet", "DeiT-Ti", "", 25.4, False, source=DEIT),
]

# Results with crops and flips, as S3-Net is trained, of networks that the paper quotes without them.
AUGMENTED_ROWS = [
    PaperRow("cifar100", "ResNet", "stochastic depth", 24.58, False, 1.7e6, source="", printed=False),
    PaperRow("cifar100", "FractalNet", "", 23.30, False, 38.6e6, source="wizwand.com: 23.3", printed=False),
    PaperRow(
        "cifar100", "DenseNet", "k=12, depth=40", 24.42, False, 1.0e6, None, 227_448_576, True, DENSENET, printed=False
    ),
    PaperRow("cifar100", "DenseNet", "k=12, depth=100", 20.20, False, 7.0e6, source=DENSENET, printed=False),
    PaperRow("cifar100", "DenseNet", "k=24, depth=100", 19.25, False, 27.2e6, source=DENSENET, printed=False),
    PaperRow("cifar100", "DenseNet-BC", "k=12, depth=100", 22.27, False, 0.8e6, source=DENSENET, printed=False),
]
