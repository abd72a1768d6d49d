//! Layers, models and checkpoints.

mod broken;
mod golden;
mod gradients;
mod hub;
mod layers;
mod support;
mod variants;
