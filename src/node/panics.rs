//! What the last panic on this thread said, for the supervisor's report.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::storage::log_disk::panic_text;

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Notes the message of each panic, beside what is done with it already. Once per process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = match info.payload_as_str() {
                Some(text) => text.to_owned(),
                None => "panicked".to_owned(),
            };
            let place = info.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
            LAST.with_borrow_mut(|last| *last = Some(format!("{text}{place}")));
            previous(info);
        }));
    });
}

/// Runs what may panic on damaged data; the panic's message is then the error.
pub fn contained<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    // What the work had hold of is dropped with it; nothing else sees it half done.
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let text = last().unwrap_or_else(|| panic_text(panic.as_ref()));
        format!("it panicked: {text}")
    })
}

/// Takes the message of the last panic on this thread.
pub fn last() -> Option<String> {
    LAST.with_borrow_mut(Option::take)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contained_panic_is_an_error_that_says_where() {
        install();
        assert_eq!(contained(|| 7), Ok(7));
        let error = contained(|| panic!("no such entry")).expect_err("it panics");
        assert!(error.starts_with("it panicked: no such entry") && error.contains("panics.rs"), "{error}");
    }
}
