# The bytes of data/calibration.jsonl, as BundledText() hands them out.
    .section .rodata
    .global prismaquant_bundled_text_begin
    .global prismaquant_bundled_text_end
    .hidden prismaquant_bundled_text_begin
    .hidden prismaquant_bundled_text_end
prismaquant_bundled_text_begin:
    .incbin "data/calibration.jsonl"
prismaquant_bundled_text_end:
    .section .note.GNU-stack, "", %progbits
