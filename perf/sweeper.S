# A guest in one boot sector, for `ramferry bench vmm`: sweeps memory from 1 MiB on, round after round,
# and shows its progress on the first serial port.
#
# First every page up to `touched` gets its own address as content. Then each page of the sweep counts
# the rounds in its first word, which is looked at before it is raised; a second word somewhere else
# changes, too. "." goes to the port at every 32 MiB, "R" at the end of a round, "W" (and no more) when
# a page is behind or ahead. `touched` and `swept`, the ends of both ranges, are the last eight bytes
# before the signature; whoever boots it sets them.
#
# as --32 sweeper.S -o sweeper.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary sweeper.o -o sweeper

        .code16
        .globl _start
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        in      $0x92, %al              # address line 20
        or      $2, %al
        out     %al, $0x92
        lgdt    table_place
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmp    $8, $protected

        .code32
protected:
        mov     $16, %ax
        mov     %ax, %ds
        mov     %ax, %es
        mov     $0x3f8, %dx
        mov     touched, %ebx
        mov     $0x100000, %edi
touch:  mov     %edi, 8(%edi)
        add     $4096, %edi
        cmp     %ebx, %edi
        jb      touch
        mov     swept, %ebx
        mov     $0x100000, %edi
clear:  movl    $0, (%edi)
        add     $4096, %edi
        cmp     %ebx, %edi
        jb      clear
        xor     %ebp, %ebp              # the round

round:  mov     $0x100000, %edi
        mov     %ebp, %ecx
        shl     $6, %ecx
        and     $0xfc0, %ecx
page:   cmp     %ebp, (%edi)
        jne     wrong
        incl    (%edi)
        lea     (%edi, %ebp), %eax
        mov     %eax, 4(%edi, %ecx)
        add     $4096, %edi
        test    $0x1ffffff, %edi
        jnz     next
        mov     $'.', %al
        out     %al, %dx
next:   cmp     %ebx, %edi
        jb      page
        inc     %ebp
        mov     $'R', %al
        out     %al, %dx
        jmp     round

wrong:  mov     $'W', %al
        out     %al, %dx
stand:  hlt
        jmp     stand

        .align  8
table:  .quad   0
        .quad   0x00cf9a000000ffff      # code
        .quad   0x00cf92000000ffff      # data
table_place:
        .word   table_place - table - 1
        .long   table

        .org    502
touched: .long  0
swept:  .long   0
        .word   0xaa55
