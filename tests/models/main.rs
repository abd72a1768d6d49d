//! Layers, models and checkpoints.

mod checkpoints;
mod config;
mod golden;
mod hub;
mod hybrid;
mod layers;
mod misuse;
mod reference;
mod scalar;
mod serving;
mod support;
mod variants;
