# A guest in one boot sector: writes to every page of its RAM, round after round, and says so.
#
# Each page from 1 MiB to 1 MiB below the end begins with the number of rounds that it has seen, which
# is looked at before it is raised; a second word somewhere else in the page changes, too. After each
# round "R" and its number (8 hexadecimal digits) go to the first serial port. A page that is behind
# or ahead ends the guest with "W" and the page's address.
#
# as --32 sweeper.S -o sweeper.o && ld -m elf_i386 -Ttext 0x7c00 --oformat binary sweeper.o -o sweeper

        .code16
        .globl _start
_start: cli
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        in      $0x92, %al              # address line 20
        or      $2, %al
        out     %al, $0x92
        mov     $0x35, %al              # memory above 16 MiB, in units of 64 KiB
        out     %al, $0x70
        in      $0x71, %al
        mov     %al, %bh
        mov     $0x34, %al
        out     %al, $0x70
        in      $0x71, %al
        mov     %al, %bl
        movzwl  %bx, %ebx
        shl     $16, %ebx
        add     $0xf00000, %ebx         # where to stop
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
        mov     %ax, %ss
        mov     $0x7c00, %esp
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
        cmp     %ebx, %edi
        jb      page
        inc     %ebp
        mov     $'R', %al
        mov     %ebp, %esi
        call    say
        jmp     round

wrong:  mov     $'W', %al
        mov     %edi, %esi
        call    say
stand:  hlt
        jmp     stand

say:    mov     $0x3f8, %dx             # a letter in al, a number in esi
        out     %al, %dx
        mov     $8, %ecx
digit:  rol     $4, %esi
        mov     %esi, %eax
        and     $15, %al
        cmp     $10, %al
        jb      small
        add     $'a' - '0' - 10, %al
small:  add     $'0', %al
        out     %al, %dx
        loop    digit
        mov     $'\n', %al
        out     %al, %dx
        ret

        .align  8
table:  .quad   0
        .quad   0x00cf9a000000ffff      # code
        .quad   0x00cf92000000ffff      # data
table_place:
        .word   table_place - table - 1
        .long   table

        .org    510
        .word   0xaa55
