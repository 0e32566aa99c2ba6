r"""Build the sprite sheet and the sign font of the synthetic world from the Noto fonts.

python scripts/make_sprites.py --emoji NotoColorEmoji.ttf --text NotoSansCJK-Bold.ttc \
    --output_dir yivl/tiny/assets/world

Needed only after a kind of object or a sign text is added. Debian packages the fonts as fonts-noto-color-emoji and
fonts-noto-cjk; subsetting the text font requires fonttools.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from string import ascii_uppercase, digits

from PIL import Image, ImageDraw, ImageFont

from yivl.tiny.world.rendering import SPRITE_COLUMNS, SPRITE_SIDE
from yivl.tiny.world.words import KINDS, SIGN_TEXTS

EMOJI_SIZE = 109
"""The only bitmap size of the emoji font, in pixels."""
SIMPLIFIED_CHINESE = 2
"""Index of the face in the font collection."""


def draw_sheet(font_path: str) -> Image.Image:
    """Return all sprites, each scaled to its cell, in 256 colors."""
    font = ImageFont.truetype(font_path, EMOJI_SIZE)
    rows = -(-len(KINDS) // SPRITE_COLUMNS)
    sheet = Image.new("RGBA", (SPRITE_COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE))
    for index, kind in enumerate(KINDS):
        glyph = Image.new("RGBA", (200, 200))
        ImageDraw.Draw(glyph).text((20, 20), kind.emoji, font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        scale = (SPRITE_SIDE - 4) / max(glyph.size)
        size = round(glyph.width * scale), round(glyph.height * scale)
        glyph = glyph.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        row, column = divmod(index, SPRITE_COLUMNS)
        corner = column * SPRITE_SIDE + (SPRITE_SIDE - glyph.width) // 2
        sheet.paste(glyph, (corner, row * SPRITE_SIDE + (SPRITE_SIDE - glyph.height) // 2))
    return sheet.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def main() -> None:
    """Write ``sprites.png`` and ``signs.otf``."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--emoji", required=True, help="font file of Noto Color Emoji")
    parser.add_argument("--text", required=True, help="font collection of Noto Sans CJK Bold")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write")
    arguments = parser.parse_args()
    draw_sheet(arguments.emoji).save(arguments.output_dir / "sprites.png", optimize=True)
    characters = "".join(sorted({*"".join(SIGN_TEXTS), *ascii_uppercase, *digits}))
    options = [f"--font-number={SIMPLIFIED_CHINESE}", f"--text={characters}", "--layout-features=", "--no-hinting"]
    target = f"--output-file={arguments.output_dir / 'signs.otf'}"
    command = [sys.executable, "-m", "fontTools.subset", arguments.text, *options, "--desubroutinize", target]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
