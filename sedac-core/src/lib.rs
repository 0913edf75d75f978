//! The decision core of SEDAC.
#![forbid(unsafe_code)]
pub mod accumulator;
mod error;
pub mod histogram;
#[cfg(feature = "python")]
mod python;
mod sync;
pub mod threshold;
pub use error::Error;
