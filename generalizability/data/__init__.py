"""From files to batches: data sets in memory, in folders and in LMDB files."""

from data.image_lmdb import ImageFolderLMDB

__all__ = ["ImageFolderLMDB"]
