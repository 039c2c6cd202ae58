//! Points at which a test has a node fail: panic, meet an error, or be late.
//!
//! The source names them by `failpoint!`, which is nothing at all in a plain build; only one for tests
//! knows what the names stand for, and how to arm them.

#[cfg(feature = "test-hooks")]
mod armed;

#[cfg(feature = "test-hooks")]
pub use armed::*;

/// A point that work has come to: its name, the replica that the work is for, and the bytes of the entry that it
/// is about, as far as there are such; perhaps only in a certain case. With a word and what is to be done
/// then, the work can fail there, and the word is why.
macro_rules! failpoint {
    ($point:ident) => {
        #[cfg(feature = "test-hooks")]
        $crate::failpoints::at($crate::failpoints::Point::$point, None, &[]);
    };
    ($point:ident, $replica:expr) => {
        #[cfg(feature = "test-hooks")]
        $crate::failpoints::at($crate::failpoints::Point::$point, Some($replica), &[]);
    };
    ($point:ident, $replica:expr, if $when:expr) => {
        #[cfg(feature = "test-hooks")]
        if $when {
            $crate::failpoints::at($crate::failpoints::Point::$point, Some($replica), &[]);
        }
    };
    ($point:ident, $replica:expr, $why:ident => $fail:expr) => {
        $crate::failpoints::failpoint!($point, $replica, &[], $why => $fail)
    };
    ($point:ident, $replica:expr, $data:expr, $why:ident => $fail:expr) => {
        #[cfg(feature = "test-hooks")]
        if let Some($why) =
            $crate::failpoints::fails($crate::failpoints::Point::$point, Some($replica), $data)
        {
            $fail
        }
    };
}

pub(crate) use failpoint;
