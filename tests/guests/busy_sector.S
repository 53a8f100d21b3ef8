# The guest of boot_sector.S, which changes its memory all the time.
.set BUSY, 1
.include "boot_sector.S"
