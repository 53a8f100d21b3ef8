# A guest in one sector: counts in RAM, fifty times a second, each value a line on the
# first serial port. "boot" stands before the first: a second one in the log, or a count that
# begins again, is a reboot; a count that goes on is the same guest.
#
#   boot
#   00000000
#   00000001
#   ...
.code16
.global _start
.set COM1, 0x3f8
.set PIT_DIVISOR, 23864             # 1193182 Hz / 50

_start:
    ljmp    $0, $entry
entry:
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %ss
    movw    $0x7c00, %sp
    movb    $0x34, %al              # timer 0: rate generator
    outb    %al, $0x43
    movw    $PIT_DIVISOR, %ax
    outb    %al, $0x40
    movb    %ah, %al
    outb    %al, $0x40
    movw    $banner, %si
1:  lodsb
    testb   %al, %al
    jz      2f
    call    put
    jmp     1b
2:  movl    $0, counter
    sti
tick:
    movw    0x46c, %bx              # the BIOS counts timer interrupts here
3:
.ifdef BUSY                         # in between it changes half a megabyte, as fast as it can
    movw    $0x1000, %di
7:  movw    %di, %es
    incl    %es:0
    addw    $0x100, %di             # the next page
    cmpw    $0x9000, %di
    jb      7b
.else
    hlt
.endif
    cmpw    0x46c, %bx
    je      3b
    movl    counter, %edx
    movw    $8, %cx
4:  roll    $4, %edx
    movb    %dl, %al
    andb    $15, %al
    addb    $'0', %al
    cmpb    $'9', %al
    jbe     5f
    addb    $('a' - '9' - 1), %al
5:  call    put
    loop    4b
    movb    $'\n', %al
    call    put
    incl    counter
    jmp     tick

put:                                # the character in %al
    pushw   %dx
    pushw   %ax
    movw    $COM1 + 5, %dx
6:  inb     %dx, %al
    testb   $0x20, %al
    jz      6b
    popw    %ax
    movw    $COM1, %dx
    outb    %al, %dx
    popw    %dx
    ret

banner: .asciz "boot\n"
.org 510
.word 0xaa55
.set counter, 0x9000
