//! Letters for the loss curve. plotters draws text with a font file only, and a font is more than a chart needs.

use anyhow::Result;
use plotters::{coord::Shift, prelude::*};

/// Pixels of a dot, dots of a character and of the gap after it.
const DOT: i32 = 2;
const COLUMNS: i32 = 5;
const ROWS: i32 = 8;
const GAP: i32 = 1;

pub const HEIGHT: i32 = 7 * DOT;

/// Pixels that `text` is wide.
pub fn width(text: &str) -> i32 {
    text.chars().count() as i32 * (COLUMNS + GAP) * DOT
}

/// Draws `text` with its upper left corner at `at`. Characters that the font lacks are left blank.
pub fn draw(area: &DrawingArea<BitMapBackend, Shift>, text: &str, at: (i32, i32)) -> Result<()> {
    for (i, character) in text.chars().enumerate() {
        let x = at.0 + i as i32 * (COLUMNS + GAP) * DOT;
        let rows = glyph(character);
        for (row, column) in (0..ROWS).flat_map(|row| (0..COLUMNS).map(move |column| (row, column))) {
            if rows[row as usize] >> (COLUMNS - 1 - column) & 1 == 1 {
                let (x, y) = (x + column * DOT, at.1 + row * DOT);
                let dot = Rectangle::new([(x, y), (x + DOT, y + DOT)], BLACK.filled());
                area.draw(&dot)?;
            }
        }
    }
    Ok(())
}

/// Rows from top to bottom, the last one for descenders; the highest of five bits is the left column.
#[rustfmt::skip]
fn glyph(character: char) -> [u8; ROWS as usize] {
    match character {
        '0' => [0b01110, 0b10001, 0b10011, 0b10101, 0b11001, 0b10001, 0b01110, 0],
        '1' => [0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110, 0],
        '2' => [0b01110, 0b10001, 0b00001, 0b00110, 0b01000, 0b10000, 0b11111, 0],
        '3' => [0b01110, 0b10001, 0b00001, 0b00110, 0b00001, 0b10001, 0b01110, 0],
        '4' => [0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010, 0],
        '5' => [0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110, 0],
        '6' => [0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110, 0],
        '7' => [0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000, 0],
        '8' => [0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110, 0],
        '9' => [0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100, 0],
        '.' => [0, 0, 0, 0, 0, 0b01100, 0b01100, 0],
        ',' => [0, 0, 0, 0, 0, 0b01100, 0b00100, 0b01000],
        '-' => [0, 0, 0, 0b11111, 0, 0, 0, 0],
        'a' => [0, 0, 0b01110, 0b00001, 0b01111, 0b10001, 0b01111, 0],
        'b' => [0b10000, 0b10000, 0b11110, 0b10001, 0b10001, 0b10001, 0b11110, 0],
        'd' => [0b00001, 0b00001, 0b01111, 0b10001, 0b10001, 0b10001, 0b01111, 0],
        'e' => [0, 0, 0b01110, 0b10001, 0b11111, 0b10000, 0b01110, 0],
        'i' => [0b00100, 0, 0b01100, 0b00100, 0b00100, 0b00100, 0b01110, 0],
        'k' => [0b10000, 0b10000, 0b10010, 0b10100, 0b11000, 0b10100, 0b10010, 0],
        'l' => [0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110, 0],
        'n' => [0, 0, 0b10110, 0b11001, 0b10001, 0b10001, 0b10001, 0],
        'o' => [0, 0, 0b01110, 0b10001, 0b10001, 0b10001, 0b01110, 0],
        'p' => [0, 0, 0b11110, 0b10001, 0b10001, 0b11110, 0b10000, 0b10000],
        'r' => [0, 0, 0b10110, 0b11001, 0b10000, 0b10000, 0b10000, 0],
        's' => [0, 0, 0b01111, 0b10000, 0b01110, 0b00001, 0b11110, 0],
        't' => [0b01000, 0b01000, 0b11100, 0b01000, 0b01000, 0b01001, 0b00110, 0],
        'v' => [0, 0, 0b10001, 0b10001, 0b10001, 0b01010, 0b00100, 0],
        'y' => [0, 0, 0b10001, 0b10001, 0b01111, 0b00001, 0b00001, 0b01110],
        _ => [0; 8],
    }
}
