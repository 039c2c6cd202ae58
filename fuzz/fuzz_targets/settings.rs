//! A settings file. What loads is printed as a file that loads the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pontoon::settings::Settings;

fuzz_target!(|text: &str| {
    let none = std::iter::empty::<(String, String)>;
    if let Ok(settings) = Settings::load_str("fuzz.toml", text, none()) {
        let again = Settings::load_str("fuzz.toml", &settings.to_toml(), none());
        assert_eq!(again.expect("what was printed loads"), settings);
    }
});
