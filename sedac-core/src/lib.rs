//! The decision core of SEDAC.
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
