//! The decision core of SEDAC: which tokens may exit early, under which thresholds, and with what guarantee.
//!
//! Pure and safe Rust; Python sees it as `sedac_core._rust` (feature `python`). Each part has a readable twin in
//! `python/sedac_core/cascade.py` or `calibration.py` that tests hold it equal to.
#![forbid(unsafe_code)]

pub mod accumulator;
pub mod certify;
mod error;
pub mod histogram;
#[cfg(feature = "python")]
mod python;
pub mod sweep;
mod sync;
pub mod threshold;
pub use error::Error;
