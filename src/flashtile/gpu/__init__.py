"""What the GPU backends share: the numbers kernels are told, device helpers in Triton, and the mailbox."""
