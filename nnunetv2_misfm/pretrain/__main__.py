"""misfm_pretrain as a module, which is how torchrun starts it: `torchrun ... -m nnunetv2_misfm.pretrain ...`."""

from nnunetv2_misfm.commands.pretrain import main

if __name__ == "__main__":
    main()
