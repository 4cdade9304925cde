//! Compiles `src/openmp.c`, for targets where llama.cpp is built with GCC's OpenMP.

fn main() {
    println!("cargo:rerun-if-changed=src/openmp.c");
    println!("cargo:rustc-check-cfg=cfg(gnu_openmp)");
    let target = |part: &str| std::env::var(format!("CARGO_CFG_TARGET_{part}")).unwrap_or_default();
    if target("OS") == "linux" && target("ENV") == "gnu" {
        cc::Build::new().file("src/openmp.c").compile("ternion_openmp");
        println!("cargo:rustc-cfg=gnu_openmp");
    }
}
