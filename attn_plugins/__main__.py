from attn_plugins.cli import main

if __name__ == "__main__":
    main()
