//! The loss curve as a picture. SVG, because it leaves the letters to whoever shows it: drawn in pixels they would need a
//! font.

use crate::{common::files::write_atomically, log::Row};
use anyhow::{Context, Result};
use plotters::{coord::Shift, prelude::*};
use std::{ops::Range, path::Path};

const SIZE: (u32, u32) = (1000, 720);
/// Points of a curve: two for each pixel across. A long run has more steps than a picture can show.
const POINTS: usize = 2000;
const GRID: RGBColor = RGBColor(225, 225, 225);
const FAINT: RGBColor = RGBColor(200, 205, 215);
const BLUE: RGBColor = RGBColor(31, 87, 164);
const RED: RGBColor = RGBColor(190, 50, 40);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Curve = Vec<(f64, f64)>;

/// Writes `loss.svg`: training loss, raw and smoothed, above; validation, where there is any, below.
pub fn write(folder: &Path, rows: &[Row]) -> Result<()> {
    let raw: Curve = rows.iter().map(|row| (row.step as f64, f64::from(row.loss))).collect();
    let valid: Curve = rows.iter().filter_map(|row| Some((row.step as f64, row.valid_bpb?))).collect();
    let mut svg = String::new();
    draw(&mut svg, &raw, &valid).context("cannot draw the loss curve")?;
    write_atomically(&folder.join("loss.svg"), svg.as_bytes())
}

fn draw(svg: &mut String, raw: &Curve, valid: &Curve) -> Result<()> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let steps = 0.0..raw.last().map_or(1.0, |point| point.0).max(1.0);
    let (thin, smooth, valid) = (thinned(raw), thinned(&smoothed(raw)), thinned(valid));
    let train = [(&thin, FAINT), (&smooth, BLUE)];
    if valid.is_empty() {
        draw_panel(&root, "train loss, nats per token", &train, &steps)?;
    } else {
        let (upper, lower) = root.split_vertically(SIZE.1 / 2);
        draw_panel(&upper, "train loss, nats per token", &train, &steps)?;
        draw_panel(&lower, "validation, bits per byte", &[(&valid, RED)], &steps)?;
    }
    root.present()?;
    Ok(())
}

/// Exponential mean over about a hundredth of the run, without the bias of its start.
fn smoothed(raw: &Curve) -> Curve {
    let keep = 1.0 - 1.0 / (raw.len() as f64 / 100.0).clamp(5.0, 200.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    raw.iter()
        .map(|&(step, loss)| {
            sum = keep * sum + loss;
            weight = keep * weight + 1.0;
            (step, sum / weight)
        })
        .collect()
}

/// Points at equal distances, the last one among them.
fn thinned(curve: &Curve) -> Curve {
    let every = curve.len().div_ceil(POINTS).max(1);
    let mut points: Curve = curve.iter().rev().step_by(every).copied().collect();
    points.reverse();
    points
}

fn draw_panel(area: &Area, caption: &str, curves: &[(&Curve, RGBColor)], steps: &Range<f64>) -> Result<()> {
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(64)
        .build_cartesian_2d(steps.clone(), value_range(curves))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|value| label(*value))
        .label_style(("sans-serif", 14))
        .draw()?;
    for (curve, color) in curves {
        chart.draw_series(LineSeries::new(curve.iter().copied(), color.stroke_width(2)))?;
        if let [point] = curve.as_slice() {
            chart.draw_series([Circle::new(*point, 3, color.filled())])?;
        }
    }
    Ok(())
}

/// All values, and a little room around them.
fn value_range(curves: &[(&Curve, RGBColor)]) -> Range<f64> {
    let all = || curves.iter().flat_map(|(curve, _)| curve.iter().map(|point| point.1));
    let low = all().fold(f64::INFINITY, f64::min);
    let high = all().fold(f64::NEG_INFINITY, f64::max);
    let room = (0.05 * (high - low)).max(1e-3);
    low - room..high + room
}

fn label(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
