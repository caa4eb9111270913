// swift-tools-version:5.9

import PackageDescription

// PYTHONKIT: a folder with its source, for a machine that does not reach GitHub
let pythonKit: Package.Dependency =
    if let folder = Context.environment["PYTHONKIT"] {
        .package(name: "PythonKit", path: folder)
    } else {
        .package(url: "https://github.com/pvieito/PythonKit.git", from: "0.5.1")
    }

let package = Package(
    name: "Gemma3",
    platforms: [.macOS(.v14)],
    products: [.library(name: "Gemma3", targets: ["Gemma3"])],
    dependencies: [pythonKit],
    targets: [
        .target(name: "Gemma3", dependencies: [.product(name: "PythonKit", package: "PythonKit")]),
        .executableTarget(name: "gemma3-ask", dependencies: ["Gemma3"]),
        .executableTarget(name: "gemma3-chat", dependencies: ["Gemma3"]),
        .testTarget(name: "Gemma3Tests", dependencies: ["Gemma3"]),
    ]
)
