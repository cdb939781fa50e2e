from bingo_compress.cli import main

main()
