//! What the last panic on this thread said, for the supervisor's report.

use std::cell::RefCell;
use std::sync::Once;

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

/// Takes the message of the last panic on this thread.
pub fn last() -> Option<String> {
    LAST.with_borrow_mut(Option::take)
}
