"""What the experiments share: errors, the command line, output files, checkpoints, images and the CPU kernels."""
